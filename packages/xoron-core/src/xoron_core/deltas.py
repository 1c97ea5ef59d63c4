"""Slot deltas: a folder with some trained slots, and proof of what they were trained over.

    delta.safetensors   the tensors of the slots, named as in a model folder
    delta.json          components and configs of the slots, their hashes, the base's hashes

The base of a slot is what it was trained against: backbone and fusion, the slots of its own
modality and what those refer to; of a backbone or a fusion it is every slot. Identities are those
of `xoron_core.identity`: the same base at another path, in other shards or in a wider dtype is the
same base; another base, or one rounded to fewer bits, is refused.

Footguns:
- The hashes find mistakes and damage. They are no signature: who can write delta.json can forge it.
- A model in memory is hashed as it is. `xoron_core.load(folder, deltas=[...], dtype=...)` hashes
  the folder's own tensors instead, so it may round them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from xoron_core.composer.composition import Composition, Slot
from xoron_core.config import Config, Source
from xoron_core.errors import FolderError, TokenSpaceError, UsageError, did_you_mean
from xoron_core.folder import read_config
from xoron_core.identity import (
    Weights,
    combined,
    folder_weights,
    identities,
    model_weights,
)
from xoron_core.storage import atomic_folder, read_tensors, recover, write_tensors

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

FORMAT = 1
RECORD = "delta.json"
TENSORS = "delta.safetensors"
_CENTRAL = ("backbone", "fusion")  # everything is trained against these, and they against it
_UNSAVED = ("tokenizer", "loss")  # kinds without tensors in a model folder


class DeltaSlot(Config):
    """One slot of a delta.

    Attributes:
        slot: its component and resolved config, and the widths it was built between.
        hash: identity of its tensors.
        dtype: of its tensors; several are joined by commas.
        parameters: numbers in its tensors.
    """

    slot: Slot
    hash: str
    dtype: str
    parameters: int


class Base(Config):
    """What a delta was trained over.

    Attributes:
        hash: of all of it.
        slots: identity of each slot, so that an error can name the one that differs.
    """

    hash: str
    slots: dict[str, str]


class Adapter(Config):
    """A low-rank adapter that was trained together with the slots and lies beside them.

    Attributes:
        file: its name.
        hash: identity of its tensors.
    """

    file: str
    hash: str


class DeltaRecord(Config):
    """The contents of delta.json.

    Attributes:
        format: of this file.
        slots: what the delta holds.
        base: what it belongs to.
        token_space_hash: of the model, None where it has no token space.
        adapter: set if the slots are only good together with an adapter.
    """

    format: int
    slots: dict[str, DeltaSlot]
    base: Base
    token_space_hash: str | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Delta:
    """A delta folder whose tensors have been checked against its record.

    Attributes:
        folder: where it lies.
        record: what it says of itself.
        tensors: by slot and name, mapped from the file.
    """

    folder: Path
    record: DeltaRecord
    tensors: dict[str, dict[str, Tensor]]


def save_delta(
    source: XoronModel | str | Path, folder: str | Path, *, slots: Iterable[str]
) -> None:
    """Writes a delta folder, whole or not at all.

    Args:
        source: a model, or a model folder, which is read without building anything.
        folder: where to write.
        slots: names of the slots to save.

    Raises:
        UsageError: for a slot that is not there or holds no tensors of its own.
        FolderError: if reading or writing fails; what stood at `folder` is then intact.
    """
    slots = list(slots)
    if not slots:
        raise UsageError("a delta needs at least one slot, e.g. image.projector")
    folder = Path(folder)
    if folder.exists() and not (folder / RECORD).exists():
        raise UsageError(f"{folder}: holds something else than a delta; choose a new folder")
    with atomic_folder(folder) as aside:
        write_delta(source, aside, slots=slots)


def write_delta(
    source: XoronModel | str | Path,
    folder: Path,
    *,
    slots: Iterable[str],
    adapter: Adapter | None = None,
) -> None:
    """Writes a delta's files into an existing folder, without the swap of `save_delta`.

    Args:
        source, slots: as for `save_delta`.
        folder: where to write.
        adapter: of the backbone, if one was trained too; then every slot that is not among `slots`
            is the base.
    """
    composition, space_hash = _described(source)
    slots = list(slots)
    _check_slots(composition, slots)
    base = base_slots(composition, slots, backbone_too=adapter is not None)
    if isinstance(source, str | Path):
        weights = folder_weights(source, [*slots, *base])
    else:
        weights = model_weights(source)
    hashes = identities({slot: weights[slot] for slot in [*slots, *base]})
    over = {slot: hashes[slot] for slot in base}
    record = DeltaRecord(
        format=FORMAT,
        slots={
            slot: DeltaSlot(
                slot=composition.slots[slot],
                hash=hashes[slot],
                dtype=dtypes(weights[slot]),
                parameters=sum(tensor.numel() for tensor in weights[slot].values()),
            )
            for slot in slots
        },
        base=Base(hash=combined(over), slots=over),
        token_space_hash=space_hash,
        adapter=adapter,
    )
    named = {file_name(slot, name): t for slot in slots for name, t in weights[slot].items()}
    write_tensors(folder / TENSORS, named)
    (folder / RECORD).write_text(json.dumps(record.data(), indent=2) + "\n", encoding="utf-8")


def read_delta(folder: str | Path) -> Delta:
    """Reads a delta and checks its tensors against their hashes.

    Raises:
        FolderError: if it is no delta, is of another format, or is damaged.
    """
    folder = Path(folder)
    data = read_record(folder, RECORD, writer="`xoron delta save`")
    record = DeltaRecord.parse(data, Source(str(folder / RECORD)))
    state = read_tensors(folder / TENSORS)
    tensors: dict[str, dict[str, Tensor]] = {slot: {} for slot in record.slots}
    for slot, group in tensors.items():
        prefix = file_name(slot, "")
        group |= {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if sum(map(len, tensors.values())) != len(state):
        raise FolderError(
            f"{folder / TENSORS}: holds tensors of slots that {RECORD} does not name (it names:"
            f" {', '.join(record.slots) or 'none'}); copy the delta again, whole"
        )
    found = identities(tensors)
    for slot, expected in record.slots.items():
        if found[slot] != expected.hash:
            raise FolderError(
                f"{folder / TENSORS}: the tensors of slot {slot!r} are {brief(found[slot])},"
                f" {RECORD} says {brief(expected.hash)}: one of the two files was changed or"
                " damaged; copy the delta again"
            )
    return Delta(folder, record, tensors)


def read_record(folder: Path, name: str, *, writer: str) -> dict[str, Any]:
    """Reads a delta's JSON file, with its format checked.

    Args:
        folder: of the delta.
        name: of the file.
        writer: what writes such files, for the error.

    Raises:
        FolderError: if it is not there, no JSON, or of another format.
    """
    recover(folder)
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FolderError(
            f"{folder}: is no delta (it has no {name}); {writer} writes one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); copy it again") from None
    number = data.get("format") if isinstance(data, dict) else None
    if number != FORMAT:
        raise FolderError(
            f"{folder}: has delta format {number!r}, this xoron-core reads {FORMAT}; open it with"
            " the version that wrote it"
        )
    return cast("dict[str, Any]", data)


def require_space(folder: Path, made_with: str | None, *, found: str | None) -> None:
    """Refuses a delta of another token space.

    Raises:
        TokenSpaceError: with both hashes.
    """
    if made_with != found:
        raise TokenSpaceError(
            f"{folder}: was made with token space {made_with}, this model has {found}; use the"
            " model folder that it was made with"
        )


def require_base(
    folder: Path, base: Base, *, weights: Weights, found: Mapping[str, str] | None = None
) -> None:
    """Refuses a delta over another base.

    Args:
        folder: of the delta.
        base: what it was made over.
        weights: of the model, what is there of the base's slots and maybe more.
        found: identities of the model's slots, if known better than from `weights`.

    Raises:
        FolderError: naming the slots that are missing or differ.
    """
    if lacking := [slot for slot in base.slots if slot not in weights]:
        raise FolderError(
            f"{folder}: was made over a base with {', '.join(lacking)}, and this model has"
            f" {', '.join(weights)}; use the model folder that it was made with"
        )
    here = {slot: weights[slot] for slot in base.slots}
    found = found if found is not None else identities(here)
    if wrong := [slot for slot, identity in base.slots.items() if found[slot] != identity]:
        kinds = dtypes({f"{s}.{name}": t for s in wrong for name, t in here[s].items()})
        raise FolderError(
            f"{folder}: was made over another base: "
            + ", ".join(
                f"slot {slot!r} is {brief(found[slot])}, expected {brief(base.slots[slot])}"
                for slot in wrong
            )
            + ". Use the model folder that it was made with, or a copy of it at any path; weights"
            f" rounded to fewer bits are another base (here they are {kinds})"
        )


def base_slots(
    composition: Composition, slots: Iterable[str], *, backbone_too: bool = False
) -> list[str]:
    """The slots that given ones are trained against.

    Args:
        composition: of the model.
        slots: what is trained.
        backbone_too: whether the backbone is adapted beside them.
    """
    slots = list(slots)
    own = {
        name
        for name, slot in composition.slots.items()
        if slot.ref is None and slot.kind not in _UNSAVED
    }
    if backbone_too or any(composition.slots[slot].kind in _CENTRAL for slot in slots):
        return sorted(own - set(slots))
    modalities = {slot.partition(".")[0] for slot in slots}
    near = {
        record.ref or name
        for name, record in composition.slots.items()
        if name.partition(".")[0] in modalities or record.kind in _CENTRAL
    }
    return sorted((own & near) - set(slots))


def brief(identity: str) -> str:
    """A hash as errors show it."""
    return identity[: len("sha256:") + 12]


def _described(source: XoronModel | str | Path) -> tuple[Composition, str | None]:
    if isinstance(source, str | Path):
        config, composition = read_config(source)
        return composition, config.token_space_hash
    return source.composition, None if source.space is None else source.space.hash


def _check_slots(composition: Composition, slots: Iterable[str]) -> None:
    own = {n: s for n, s in composition.slots.items() if s.kind not in _UNSAVED}
    for slot in slots:
        if slot not in own:
            raise UsageError(
                f"this model has no slot {slot!r}.{did_you_mean(slot, own)} It has:"
                f" {', '.join(own)}"
            )
        if (shared := own[slot].ref) is not None:
            raise UsageError(f"slot {slot!r} is shared from {shared!r}; name {shared!r} instead")


def dtypes(tensors: Mapping[str, Tensor]) -> str:
    """The dtypes of some tensors, as records name them."""
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))


def file_name(slot: str, name: str) -> str:
    """What a slot's tensor is called in files."""
    return f"slots.{slot.replace('.', '__')}.{name}"
