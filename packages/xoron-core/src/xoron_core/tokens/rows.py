"""Tensor side of the token space: id maps that refuse what is out of range, and row masks.

An id mapper that lets a wrong code through maps one medium into another's range, so every value
is checked, at the price of one synchronisation per call on an accelerator.

Shapes: (...) any; R rows of the space; K its number of ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xoron_core.errors import TokenSpaceError
from xoron_core.tokens.ranges import Range, check_integer

if TYPE_CHECKING:
    from xoron_core.tokens.space import TokenSpace

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def to_global(space: TokenSpace, range_name: str, local_ids: Tensor) -> Tensor:
    """(...) local ids to (...) int64 ids; see `TokenSpace.to_global`."""
    found = space.range(range_name)
    if found.removed:
        raise TokenSpaceError(f"range {range_name!r} is a hole: it was removed from this space")
    local = _integers(local_ids, range_name)
    _refuse((local < 0) | (local >= found.size), local, f"range {range_name!r}", found.size)
    ids = local + found.start
    if found.kind == "special":  # single tokens may have been removed inside the range
        _refuse(~_live(space, ids.device)[ids], local, f"range {range_name!r}", found.size)
    return ids


def to_local(space: TokenSpace, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(...) ids to (...) range indices and (...) local ids; see `TokenSpace.to_local`."""
    ids = _integers(ids, "the token space")
    _refuse((ids < 0) | (ids >= space.size), ids, "the token space", space.size)
    _refuse(~_live(space, ids.device)[ids], ids, "the token space", space.size)
    starts = torch.tensor([r.start for r in space.ranges], dtype=torch.int64, device=ids.device)
    index = torch.bucketize(ids, starts, right=True) - 1
    return index, ids - starts[index]


def allowed(
    space: TokenSpace,
    *,
    text: bool,
    specials: Iterable[str],
    codecs: Iterable[str],
    rows: int | None,
) -> Tensor:
    """(rows,) bool; see `TokenSpace.allowed`."""
    rows = space.size if rows is None else rows
    if rows < space.size:
        raise TokenSpaceError(f"logits have {rows} rows, the token space has {space.size}")
    mask = torch.zeros(rows, dtype=torch.bool)
    if text:
        mask[: space.text_size] = True
    groups = space.groups()
    for name in _names(specials, "specials"):
        members = groups.get(name)
        if members is None and space.find(name) is None:
            members = groups.get(f"xoron-core/{name}")
        mask[[s.id for s in members] if members else [space.id_of(name)]] = True
    for name in _names(codecs, "codecs"):
        for found in _codec_ranges(space, name):
            mask[found.start : found.stop] = True
    return mask


def new_rows(space: TokenSpace, base_rows: int) -> Tensor:
    """Int64 ids of rows to draw anew; see `TokenSpace.new_rows`."""
    check_integer(base_rows, "base_rows", least=0)
    return torch.arange(min(space.text_size, base_rows), space.size, dtype=torch.int64)


def _names(names: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TokenSpaceError(f"{what}={names!r}: expected several names; write [{names!r}]")
    return tuple(names)


def _codec_ranges(space: TokenSpace, name: str) -> tuple[Range, ...]:
    if ":" not in name:
        return space.codebooks(name)
    found = space.range(name)
    if found.removed:
        raise TokenSpaceError(f"range {name!r} is a hole: it was removed from this space")
    return (found,)


def _live(space: TokenSpace, device: torch.device) -> Tensor:
    """(R,) bool: which ids mean something."""
    cached: Tensor | None = space.__dict__.get("_live_rows")
    if cached is None or cached.device != device:
        cached = torch.ones(space.size, dtype=torch.bool)
        for special in space.specials:
            if special.removed:
                cached[special.id] = False
        for entry in space.codecs:
            if entry.removed:
                cached[entry.start : entry.start + entry.range.size] = False
        cached = cached.to(device)
        space.__dict__["_live_rows"] = cached
    return cached


def _integers(ids: Tensor, what: str) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TokenSpaceError(f"ids for {what} must be an integer tensor, got {got}")
    return ids.to(torch.int64)


def _refuse(bad: Tensor, values: Tensor, what: str, size: int) -> None:
    if not bool(bad.any()):
        return
    position = tuple(bad.nonzero()[0].tolist())
    value = int(values[position])
    reason = f"outside 0 .. {size - 1}" if not 0 <= value < size else "a removed token (a hole)"
    raise TokenSpaceError(f"id {value} at position {position} is {reason} in {what}")
