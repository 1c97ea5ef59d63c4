"""Row deltas: a folder with the trained vocabulary rows of a model, and proof of what they fit.

    trainable_rows.safetensors  the rows of embedding and head, named as in a model folder
    trainable_rows.json         which rows, their hash and dtype, the base's hashes
    token_space.json            what the rows mean

The base is every other slot, and of the backbone everything but these rows and the padding behind
the token space. So it does not matter how a base drew the rows that the delta replaces.

`old_rows` reads the old form, `trainable_rows.pt`.

Footguns:
- The hashes find mistakes and damage. They are no signature.
- A model in memory is hashed as it is, and rounding it makes it another base;
  `xoron_core.load(folder, deltas=[...], dtype=...)` hashes the folder's own tensors instead.

Shapes: R rows of the delta, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core import old_rows
from xoron_core.config import Config, Source
from xoron_core.deltas import (
    FORMAT,
    Base,
    base_slots,
    brief,
    dtypes,
    file_name,
    read_record,
    require_base,
    require_space,
)
from xoron_core.errors import FolderError, TokenSpaceError, UsageError
from xoron_core.folder import SPACE
from xoron_core.identity import Weights, combined, identities, model_weights
from xoron_core.nn.split_rows import put_rows, vocabulary
from xoron_core.rows import new_rows, separate_ids
from xoron_core.storage import atomic_folder, read_tensors, write_tensors
from xoron_core.tokens.space import TokenSpace

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

RECORD = old_rows.RECORD  # both forms have a record of this name
TENSORS = "trainable_rows.safetensors"


class RowRecord(Config):
    """The contents of trainable_rows.json.

    Attributes:
        format: of this file.
        slot: the backbone's.
        rows: ranges of ids, each from its first to behind its last, ascending.
        hash: identity of the tensors.
        dtype: of the tensors.
        parameters: numbers in them.
        base: what the rows were trained over; None only in the old form.
        token_space_hash: of the model, None where it has no token space.
    """

    format: int
    slot: str
    rows: tuple[tuple[int, int], ...]
    hash: str
    dtype: str
    parameters: int
    base: Base | None
    token_space_hash: str | None = None

    def ids(self) -> Tensor:
        """(R,) int64, ascending."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.rows])


@dataclass(frozen=True)
class RowDelta:
    """A row delta whose tensors have been checked against its record.

    Attributes:
        folder: where it lies.
        record: what it says of itself.
        tensors: (R, D) by the matrix's name below its slot.
        space: what the rows mean, or None.
    """

    folder: Path
    record: RowRecord
    tensors: dict[str, Tensor]
    space: TokenSpace | None


def save_rows(model: XoronModel, folder: str | Path, *, ids: Tensor | None = None) -> None:
    """Writes rows of a model's embedding and head, whole or not at all.

    Args:
        model: its rows set apart or not.
        folder: where to write.
        ids: (R,) int64; None takes the rows that are set apart, else `xoron_core.rows.new_rows`.

    Raises:
        UsageError: if the folder holds something else, or an id is no row.
        FolderError: if writing fails; what stood at `folder` is then intact.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / RECORD).exists():
        raise UsageError(f"{folder}: holds something else than rows; choose a new folder")
    chosen = separate_ids(model) if ids is None else ids
    chosen = (new_rows(model) if chosen is None else chosen).to("cpu", torch.int64).unique()
    slot, weights = model.need_backbone().slot, model_weights(model)
    matrices = _matrices(model)
    last = min(len(weights[slot][name]) for name in matrices)
    if not len(chosen) or int(chosen[0]) < 0 or int(chosen[-1]) >= last:
        raise UsageError(f"ids: expected rows of 0 .. {last - 1}, got {chosen.tolist()[:8]}")
    tensors = {n: weights[slot][n][chosen.to(weights[slot][n].device)] for n in matrices}
    over = identities(_base_weights(model, weights, chosen))
    base = Base(hash=combined(over), slots=over)
    space_hash = None if model.space is None else model.space.hash
    record = _record(slot, _ranges(chosen), tensors, base, space_hash)
    with atomic_folder(folder) as aside:
        write_tensors(aside / TENSORS, {file_name(slot, n): t for n, t in tensors.items()})
        (aside / RECORD).write_text(json.dumps(record.data(), indent=2) + "\n", encoding="utf-8")
        if model.space is not None:
            model.space.save(aside / SPACE)


def holds_rows(folder: str | Path) -> bool:
    """Whether a folder is a row delta, of the old form or not."""
    return (Path(folder) / RECORD).exists()


def is_old(folder: str | Path) -> bool:
    """Whether a folder holds rows of the old form alone."""
    return (Path(folder) / old_rows.TENSORS).exists() and not (Path(folder) / TENSORS).exists()


def read_rows(folder: str | Path) -> RowDelta:
    """Reads a row delta and checks its tensors and its token space against its record.

    Raises:
        FolderError: if it is no row delta, is damaged, or is of the old form.
        TokenSpaceError: if its token space is not the one it was made with.
    """
    folder = Path(folder)
    if is_old(folder):
        raise FolderError(
            f"{folder}: is of the old form, which names no base; if you know that this model is"
            " its base, use load_rows(model, folder, trust_base=True), or --trust-base with"
            " `xoron delta apply`"
        )
    data = read_record(folder, RECORD, writer="xoron_core.save_rows")
    record = RowRecord.parse(data, Source(str(folder / RECORD)))
    prefix = file_name(record.slot, "")
    tensors = {n.removeprefix(prefix): t for n, t in read_tensors(folder / TENSORS).items()}
    found = identities({record.slot: tensors})[record.slot]
    if found != record.hash:
        raise FolderError(
            f"{folder / TENSORS}: the rows are {brief(found)}, {RECORD} says {brief(record.hash)}:"
            " one of the two files was changed or damaged; copy the delta again"
        )
    if record.base is None:
        raise FolderError(f"{folder / RECORD}: names no base; save the rows again from their model")
    old_rows.check_ranges(folder / RECORD, record.rows)
    number = sum(stop - start for start, stop in record.rows)
    if wrong := [name for name, tensor in tensors.items() if tensor.shape[:1] != (number,)]:
        raise FolderError(
            f"{folder}: {RECORD} names {number} rows, {wrong[0]} has {len(tensors[wrong[0]])};"
            " copy the delta again, whole"
        )
    return RowDelta(folder, record, tensors, _own_space(folder, record))


def load_rows(model: XoronModel, folder: str | Path, *, trust_base: bool = False) -> None:
    """Puts the rows of a delta into a model, in place, set apart or not.

    Args:
        model: the base; hashed as it is in memory.
        folder: as `save_rows` wrote it, or of the old form.
        trust_base: for the old form, which names no base: that this model is it.

    Raises:
        FolderError: if the delta is damaged, does not fit, or was made over another base.
        TokenSpaceError: if it was made with another token space.
    """
    folder = Path(folder)
    if trust_base and not (folder / TENSORS).exists():
        space_hash = None if model.space is None else model.space.hash
        slot, matrices = model.need_backbone().slot, list(_matrices(model))
        rows, tensors, made_with = old_rows.read(folder, matrices)
        record = _record(slot, rows, tensors, None, made_with or space_hash)
        apply_rows(model, RowDelta(folder, record, tensors, model.space))
    else:
        apply_rows(model, read_rows(folder))


@torch.no_grad()
def apply_rows(model: XoronModel, delta: RowDelta, *, weights: Weights | None = None) -> None:
    """Checks that rows belong to a model and copies them in.

    Args:
        model: changed in place, or not at all if an error is raised.
        delta: as read.
        weights: of the base, if its folder says it better than the model in memory.

    Raises:
        XoronError: as `load_rows`.
    """
    record = delta.record
    space_hash = None if model.space is None else model.space.hash
    require_space(delta.folder, record.token_space_hash, found=space_hash)
    modules, ids = _matrices(model), record.ids()
    ours = {n: (len(ids), *module.weight.shape[1:]) for n, module in modules.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in delta.tensors.items()}
    last = min(len(module.weight) for module in modules.values())
    if ours != theirs or int(ids[-1]) >= last:
        raise FolderError(
            f"{delta.folder}: holds {theirs} for rows up to {int(ids[-1])}, this model expects"
            f" {ours} for rows below {last}; use the model that the rows were trained in"
        )
    if record.base is not None:
        own = model_weights(model) if weights is None else weights
        require_base(delta.folder, record.base, weights=_base_weights(model, own, ids))
    for name, module in modules.items():
        put_rows(module, ids, delta.tensors[name])


def replaced(weights: Mapping[str, Tensor], delta: RowDelta) -> dict[str, Tensor]:
    """The tensors of a backbone with the rows of a delta in copies of its matrices."""
    patched = dict(weights)
    for name, rows in delta.tensors.items():
        patched[name] = weights[name].index_copy(0, delta.record.ids(), rows.to(weights[name]))
    return patched


def _record(
    slot: str,
    rows: tuple[tuple[int, int], ...],
    tensors: dict[str, Tensor],
    base: Base | None,
    space_hash: str | None,
) -> RowRecord:
    return RowRecord(
        format=FORMAT,
        slot=slot,
        rows=rows,
        hash=identities({slot: tensors})[slot],
        dtype=dtypes(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        base=base,
        token_space_hash=space_hash,
    )


def _matrices(model: XoronModel) -> dict[str, Any]:
    """Embedding and head by the name of their matrix below the slot; a tied head is left out."""
    backbone = model.need_backbone()
    chosen: dict[int, nn.Module] = {}
    for module in vocabulary(backbone.model):
        chosen.setdefault(id(module._parameters["weight"]), module)
    names = {id(module): name for name, module in backbone.named_modules()}
    return {f"{names[id(module)]}.weight": module for module in chosen.values()}


def _base_weights(model: XoronModel, weights: Weights, ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """What rows are trained over: every slot, the vocabulary without the rows and the padding."""
    slot = model.need_backbone().slot
    others = base_slots(model.composition, [slot])
    base = {name: dict(weights[name]) for name in others if name in weights}
    own = dict(weights[slot])
    for name in _matrices(model):
        kept = torch.ones(len(own[name]), dtype=torch.bool)
        kept[ids] = False
        if model.space is not None:
            kept[model.space.size :] = False
        own[name] = own[name][kept.to(own[name].device)]
    return {slot: own, **base}


def _ranges(ids: Tensor) -> tuple[tuple[int, int], ...]:
    """Ascending ids as ranges."""
    breaks = (ids.diff() != 1).nonzero().flatten() + 1
    parts = ids.tensor_split(breaks.tolist())
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts)


def _own_space(folder: Path, record: RowRecord) -> TokenSpace | None:
    if record.token_space_hash is None:
        return None
    space = TokenSpace.load(folder / SPACE)
    if space.hash != record.token_space_hash:
        raise TokenSpaceError(
            f"{folder / SPACE}: is token space {space.hash}, the rows were made with"
            f" {record.token_space_hash}; restore the delta's own {SPACE}"
        )
    return space
