"""Backbones: causal, cached as uncached, and padding and documents honoured as declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xoron_core.errors import XoronError
from xoron_core.testing.catalogue import check
from xoron_core.testing.drivers import BackboneDriver
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import difference

BACKBONE = ("backbone",)
LENGTH = 12
TOLERANCE = 1e-4


def _setup(subject: Subject) -> tuple[Any, Tensor]:
    """A backbone and (2, LENGTH) ids."""
    feed = BackboneDriver(subject)
    return subject.build(), feed.batch([(1, 2), (2, 2)])["input_ids"]


@check(
    "backbone-shapes",
    BACKBONE,
    since=1,
    summary="hidden states are hidden_size wide, logits have a row for every id of the space",
)
def backbone_shapes(subject: Subject) -> None:
    part, ids = _setup(subject)
    where = subject.component.factory
    with torch.no_grad():
        embeddings = part.embed(ids)
        hidden = part(embeddings).hidden
        logits = part.logits(hidden)
    for name, value in (("embed", embeddings), ("forward", hidden)):
        if value.shape != (*ids.shape, part.hidden_size):
            raise CheckFailed(
                f"{where}.{name} gives {tuple(value.shape)}, expected"
                f" {(*ids.shape, part.hidden_size)} (hidden_size is {part.hidden_size})"
            )
    if logits.shape[-1] < subject.space.size:
        raise CheckFailed(
            f"{where}.logits has {logits.shape[-1]} rows, but the token space has"
            f" {subject.space.size} ids; take the number of rows from context.space"
        )


@check(
    "backbone-causal",
    BACKBONE,
    since=1,
    summary="later positions change nothing before them",
    needs=("runs", "backbone-shapes"),
)
def backbone_causal(subject: Subject) -> None:
    part, ids = _setup(subject)
    changed = ids.clone()
    changed[:, 8:] = changed[:, 8:] % 255 + 1
    with torch.no_grad():
        first, second = (part(part.embed(x)).hidden for x in (ids, changed))
    if off := difference({"hidden": first[:, :8]}, {"hidden": second[:, :8]}, TOLERANCE):
        raise CheckFailed(f"{subject.component.factory}: later ids change earlier positions: {off}")
    if not difference({"hidden": first[:, 8:]}, {"hidden": second[:, 8:]}, TOLERANCE):
        raise CheckFailed(f"{subject.component.factory}: other ids give the same hidden states")


@check(
    "backbone-cache",
    BACKBONE,
    since=1,
    summary="decoding with the cache equals running everything at once",
    needs=("runs", "backbone-causal"),
)
def backbone_cache(subject: Subject) -> None:
    part, ids = _setup(subject)
    where = subject.component.factory
    with torch.no_grad():
        expected = part(part.embed(ids)).hidden
        first = part(part.embed(ids[:, :7]), use_cache=True)
        if first.cache is None:
            raise CheckFailed(f"{where}.forward(use_cache=True) returns no cache")
        pieces, cache = [first.hidden], first.cache
        for at in range(7, LENGTH):
            step = part(part.embed(ids[:, at : at + 1]), cache=cache)
            pieces.append(step.hidden)
            cache = step.cache
    if off := difference({"hidden": torch.cat(pieces, 1)}, {"hidden": expected}, TOLERANCE):
        raise CheckFailed(
            f"{where}: position by position with the cache it gives something else than at once:"
            f" {off}; positions go on where the cache ends, and every layer reads it"
        )


@check(
    "backbone-padding",
    BACKBONE,
    since=1,
    summary="a row padded on the left gives what it gives alone, with the cache too",
    needs=("runs", "backbone-cache", "padding-invariance"),
)
def backbone_padding(subject: Subject) -> None:
    part, ids = _setup(subject)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        alone = part(part.embed(ids[:1, 4:])).hidden
        padded = part(part.embed(ids), attention_mask=mask).hidden[:1, 4:]
        first = part(part.embed(ids[:, :9]), attention_mask=mask[:, :9], use_cache=True)
        rest = part(part.embed(ids[:, 9:]), attention_mask=mask, cache=first.cache)
        cached = torch.cat([first.hidden, rest.hidden], 1)[:1, 4:]
    for how, got in (("", padded), (" with the cache", cached)):
        if off := difference({"hidden": alone}, {"hidden": got}, TOLERANCE):
            raise CheckFailed(
                f"{subject.component.factory}: a row padded on the left{how} differs from the row"
                f" alone: {off}; mask padded positions and count positions from the mask"
            )


@check(
    "backbone-documents",
    BACKBONE,
    since=1,
    summary="packed documents equal separate ones where honours_documents says so",
    needs=("runs", "backbone-causal"),
)
def backbone_documents(subject: Subject) -> None:
    part, ids = _setup(subject)
    where = subject.component.factory
    documents = torch.tensor([[1] * 5 + [2] * (LENGTH - 5)])
    with torch.no_grad():
        if not part.honours_documents:
            try:
                part(part.embed(ids[:1]), document_ids=documents)
            except XoronError:
                return
            raise CheckFailed(
                f"{where}: honours_documents is False, but forward takes document_ids and lets"
                " documents see each other; raise a CompositionError"
            )
        packed = part(part.embed(ids[:1]), document_ids=documents).hidden
        apart = torch.cat([part(part.embed(x)).hidden for x in (ids[:1, :5], ids[:1, 5:])], 1)
    if off := difference({"hidden": packed}, {"hidden": apart}, TOLERANCE):
        raise CheckFailed(
            f"{where}: packed documents differ from separate ones: {off}; mask by document_ids and"
            " count positions anew in each, or set honours_documents = False"
        )


@check(
    "backbone-rows",
    BACKBONE,
    since=1,
    summary="resize_rows draws the named rows and keeps every other bit",
    needs=("runs", "backbone-shapes"),
)
def backbone_rows(subject: Subject) -> None:
    part, ids = _setup(subject)
    where = f"{subject.component.factory}.resize_rows"
    every = torch.arange(subject.space.size)
    new = torch.tensor([3, 5])
    kept = torch.ones(len(every), dtype=torch.bool).index_fill(0, new, False)
    with torch.no_grad():
        before = part.embed(every).clone()
        part.resize_rows(len(every) + 8, new, torch.Generator().manual_seed(1))
        after = part.embed(every)
        rows = part.logits(part(part.embed(ids)).hidden).shape[-1]
    if not torch.equal(before[kept], after[kept]) or torch.equal(before[new], after[new]):
        raise CheckFailed(
            f"{where} moved rows that were not named, or kept those that were; draw `new_rows`"
            " alone from N(0, 0.02)"
        )
    if rows < len(every) + 8:
        raise CheckFailed(f"{where}: logits have {rows} rows after asking for {len(every) + 8}")


@check(
    "backbone-loss-counts",
    BACKBONE,
    since=1,
    summary="loss_counts(batch) are the counts of the losses that forward returns",
)
def backbone_loss_counts(subject: Subject) -> None:
    feed, part = BackboneDriver(subject), subject.build()
    batch = feed.batch([(1, 1), (2, 3)])
    part.train()
    output = part(part.embed(batch["input_ids"]), attention_mask=batch["attention_mask"])
    declared = {name: float(count) for name, count in part.loss_counts(batch).items()}
    actual = {name: float(term.count) for name, term in output.losses.items()}
    if not declared and not actual:
        raise CheckSkipped("it has no losses of its own")
    if declared != actual:
        raise CheckFailed(
            f"{subject.component.factory}.loss_counts says {declared}, forward counts {actual}"
        )
