"""What an item becomes depends on the item, and on nothing that stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xoron_core.testing.catalogue import check
from xoron_core.testing.checks.learning import perturb
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Item, Subject
from xoron_core.testing.tensors import Named, common, difference, take

PADDED = ("encoder", "projector", "codec", "autoencoder", "backbone", "fusion")
ITEMWISE = (*PADDED, "generator")
# A model never runs its backbone on no rows, and transformers' models cannot.
TAKES_NONE = tuple(kind for kind in ITEMWISE if kind != "backbone")
SAME_SIZE = ((1, 2), (2, 2), (3, 2))
OTHER_SIZES = ((1, 1), (2, 4), (3, 2))
# Batched matrix products sum in another order than those of one item.
TOLERANCE = 1e-4


@check(
    "sees-its-input",
    ("encoder", "projector", "codec", "autoencoder"),
    since=1,
    summary="other media give another result",
    needs=("runs", "determinism"),
)
def sees_its_input(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    perturb(part)
    with torch.no_grad():
        first, other = (
            feed.outputs(part, feed.batch([(seed + step, 2) for seed in range(4)]))
            for step in (1, 11)
        )
    if not difference(first, other):
        raise CheckFailed(
            f"{subject.component.factory}: four media and four others give the same result bit for"
            " bit; it does not see its input"
        )


@check(
    "batch-invariance",
    ITEMWISE,
    since=1,
    summary="an item gives the same alone as beside others of its size",
    needs=("runs", "global-rng"),
)
def batch_invariance(subject: Subject) -> None:
    for index, off in _alone_and_together(subject, SAME_SIZE):
        raise CheckFailed(
            f"{subject.component.factory}: item {index} of a batch gives another result than alone:"
            f" {off}; statistics over the batch axis (batch norm, a mean over items) do that"
        )


@check(
    "padding-invariance",
    PADDED,
    since=1,
    summary="an item gives the same beside a longer one, which pads it",
    needs=("runs", "batch-invariance", "backbone-causal"),
)
def padding_invariance(subject: Subject) -> None:
    if not driver(subject).varies:
        subject.need_samples()
    for index, off in _alone_and_together(subject, OTHER_SIZES):
        raise CheckFailed(
            f"{subject.component.factory}: item {index}, padded to the length of a longer one,"
            f" gives another result than alone: {off}; leave padding out of attention, norms and"
            " pooling by the mask"
        )


@check(
    "single-and-empty",
    TAKES_NONE,
    since=1,
    summary="one item works, and no item gives an empty result of the same width",
)
def single_and_empty(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    batch = feed.batch([(1, 1)])
    where = subject.component.factory
    with torch.no_grad():
        one = feed.outputs(part, batch)
        try:
            none = feed.outputs(part, take(batch, slice(0, 0)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckFailed(
                f"{where}: a batch of no items fails ({type(error).__name__}: {error}); a rank may"
                " have none, so return tensors whose first axis is 0"
            ) from error
    for name, value in one.items():
        if len(value) != 1 or len(none[name]) != 0 or value.shape[1:] != none[name].shape[1:]:
            raise CheckFailed(
                f"{where}: {name} is {tuple(value.shape)} for one item and"
                f" {tuple(none[name].shape)} for none; only the first axis may change"
            )


def _alone_and_together(subject: Subject, items: Sequence[Item]) -> list[tuple[int, str]]:
    """The items whose result in the batch differs from that alone, and how."""
    feed, part = driver(subject), subject.build()
    found = []
    with torch.no_grad():
        together = feed.outputs(part, feed.batch(items))
        for index, item in enumerate(items):
            alone = feed.outputs(part, feed.batch([item]))
            row: Named = take(together, [index])
            if off := difference(*common(alone, row), TOLERANCE):
                found.append((index, off))
    return found
