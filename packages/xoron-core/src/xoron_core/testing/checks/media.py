"""Declared widths and counts are true, and processors travel to data workers."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from xoron_core.components import Features
from xoron_core.testing.catalogue import MEDIA, check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.subject import HIDDEN, Subject
from xoron_core.testing.tensors import difference, named

SIZES = ((1, 1), (2, 3), (3, 2))


@check(
    "declared-widths",
    ("encoder", "projector", "codec", "generator"),
    since=1,
    summary="outputs are as wide as declared",
)
def declared_widths(subject: Subject) -> None:
    part, feed = subject.build(), driver(subject)
    batch = feed.batch([(1, 1), (2, 1)])
    where = subject.component.factory
    with torch.no_grad():
        if subject.kind == "encoder":
            width = part(**batch).values.shape[-1]
            _same(where, "the width of its features", width, "feature_size", part.feature_size)
        elif subject.kind == "projector":
            width = part(Features(**batch)).values.shape[-1]
            _same(where, "the width of its output", width, "context.hidden_size", HIDDEN)
        elif subject.kind == "codec":
            books = part.encode(**batch).ids.shape[-1]
            ranges = len(part.ranges(subject.config))
            _same(where, "its number of codebooks", books, "len(ranges(config))", ranges)
        else:
            shape = (part.num_queries(subject.config), HIDDEN)
            expected = "(num_queries(config), context.hidden_size)"
            _same(where, "the shape of queries()", tuple(part.queries().shape), expected, shape)


@check(
    "token-counts",
    ("encoder", "projector", "codec"),
    since=1,
    summary="num_positions is exact for media of every size",
)
def token_counts(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    if not feed.varies:
        subject.need_samples()
    batch = feed.batch(SIZES)
    with torch.no_grad():
        if subject.kind == "projector":
            mask = part(Features(**batch)).mask
            features = batch["mask"].sum(-1).tolist()
            declared = [part.num_positions(subject.config, n) for n in features]
        else:
            mask = part.encode(**batch).mask if subject.kind == "codec" else part(**batch).mask
            assert subject.processor is not None
            declared = [subject.processor.num_positions(subject.item(item)) for item in SIZES]
    if mask.dtype != torch.bool:
        raise CheckFailed(f"{subject.component.factory}: the mask is {mask.dtype}, expected bool")
    actual = mask.sum(-1).tolist()
    if actual != declared:
        sizes = [size for _, size in SIZES]
        owner = subject.cls if subject.kind == "projector" else type(subject.processor)
        raise CheckFailed(
            f"{owner.__name__}.num_positions: for media of sizes {sizes} it says {declared}, but"
            f" the mask of the output holds {actual}; a data worker lays out the sequence by it,"
            " so it must be exact"
        )


@check(
    "processor",
    MEDIA,
    since=1,
    summary="the processor is picklable, weight-free and repeatable, for spawned workers",
    needs=("references", "config-default"),
)
def processor(subject: Subject) -> None:
    where = f"{subject.component.factory}.processor"
    found = subject.processor
    if found is None:
        raise CheckFailed(f"{where} returns None; a {subject.kind} takes media, so it needs one")
    try:
        again = pickle.loads(pickle.dumps(found))  # noqa: S301 - made a moment ago
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckFailed(
            f"{where}: it cannot be pickled ({error}), but workers are spawned; keep it at module"
            " level, without lambdas, locks or open files"
        ) from error
    fields = getattr(found, "__dict__", {}).items()
    held = [name for name, value in fields if isinstance(value, nn.Module | Tensor)]
    if held:
        raise CheckFailed(f"{where}: it holds weights in {held[0]}; a processor has none")
    if not subject.samples:
        raise CheckSkipped(f"modality {subject.component.modality!r} declares no `sample`")
    items = [subject.item(item) for item in SIZES]
    _plain(where, items[0])
    first = found.collate(items)
    if any(len(tensor) != len(SIZES) for tensor in first.values()):
        shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
        raise CheckFailed(
            f"{where}: collate gives {shapes} for {len(SIZES)} items; the first axis of every"
            " tensor is the item"
        )
    if off := difference(named(first), named(again.collate([subject.item(i) for i in SIZES]))):
        raise CheckFailed(f"{where}: pickled and loaded it gives other tensors: {off}")


def _plain(where: str, item: dict[str, Any]) -> None:
    try:
        pickle.dumps(item)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckFailed(
            f"{where}: an item of load() cannot be pickled ({error}), but it travels from a worker"
        ) from error


def _same(where: str, what: str, actual: Any, field: str, declared: Any) -> None:
    if actual != declared:
        raise CheckFailed(
            f"{where}: {what} is {actual}, but {field} is {declared}; correct one of them"
        )
