"""Losses: a sum and a count that add up over any split of a batch."""

from __future__ import annotations

import torch

from xoron_core.testing.catalogue import check
from xoron_core.testing.drivers import LossDriver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Batch, Subject
from xoron_core.testing.tensors import named, take

LOSS = ("loss",)
ITEMS = ((1, 1), (2, 3), (3, 2), (4, 2))
TOLERANCE = 1e-4


@check(
    "loss-additive",
    LOSS,
    since=1,
    summary="sum, count and metrics of a batch are those of its parts, added",
)
def loss_additive(subject: Subject) -> None:
    feed, part = LossDriver(subject), subject.build()
    batch = feed.batch(ITEMS)
    with torch.no_grad():
        whole = feed.outputs(part, batch)
        parts = [feed.outputs(part, take(batch, piece)) for piece in (slice(0, 1), slice(1, 4))]
    for name, value in whole.items():
        added = sum(float(piece[name]) for piece in parts)
        if abs(added - float(value)) > TOLERANCE * max(1.0, abs(float(value))):
            raise CheckFailed(
                f"{subject.component.factory}.forward: {name} is {float(value):g} for a batch but"
                f" {added:g} for its parts, added; return sums over items, never means, and let the"
                " trainer divide by the global count"
            )


@check("loss-count", LOSS, since=1, summary="count(batch) is the count that forward returns")
def loss_count(subject: Subject) -> None:
    feed, part = LossDriver(subject), subject.build()
    for items in (ITEMS[:1], ITEMS):
        batch = feed.batch(items)
        with torch.no_grad():
            actual = float(feed.term(part, batch).count)
            declared = float(part.count(feed.fields(batch)))
        if declared != actual:
            raise CheckFailed(
                f"{subject.component.factory}.count says {declared:g} for {len(items)} items,"
                f" forward returns {actual:g}; a trainer divides by it before any forward, so they"
                " must be equal"
            )


@check(
    "loss-absent",
    LOSS,
    since=1,
    summary="without its media it is zero and counts zero",
    needs=("runs", "loss-count"),
)
def loss_absent(subject: Subject) -> None:
    part = subject.build()
    where = subject.component.factory
    batch: Batch = {"input_ids": None, "labels": None, "media": {}}
    with torch.no_grad():
        term = part({}, batch)
        counts = float(part.count(batch)), float(term.count)
    values = named({"sum": term.sum, "metrics": term.metrics})
    if any(counts) or any(value.any() for value in values.values()):
        raise CheckFailed(
            f"{where}: for a batch without its media, count() is {counts[0]:g} and forward gives"
            f" {float(term.sum):g} with count {counts[1]:g}; expected zeros"
        )
