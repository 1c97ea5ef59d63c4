"""What a slot's weights are, as one hash: independent of paths, versions, files and shards.

The hash covers names, shapes and *values*. A change of dtype that loses nothing keeps it (bf16
weights that training holds in fp32 are the same weights); rounding to fewer bits makes other
weights. So each floating tensor is hashed in one canonical form: as bf16 if bf16 holds it exactly,
else as fp32; float64, float8 and integers as they are.

Footgun: tensors on the meta device (offloaded ones too) have no values; hash the folder instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xoron_core.errors import FolderError
from xoron_core.folder import check_files
from xoron_core.storage import read_tensors

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

# By slot, then by name below the slot.
Weights = Mapping[str, Mapping[str, Tensor]]

_LOW_BITS = 0xFFFF  # of an fp32 number, those that bf16 lacks
_PIECE = 1 << 20
_MAX_THREADS = 8  # beyond that, memory is the limit; each may hold a converted copy of one tensor


def model_weights(model: XoronModel) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model by slot, not copied; tied ones once, as a model folder has them."""
    state = model.state_dict()
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    return _by_slot(state, model.composition.slots)


def folder_weights(folder: str | Path, slots: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of some slots of a model folder, mapped from its files: nothing is read yet.

    Raises:
        FolderError: if files are missing or damaged.
    """
    slots = list(slots)
    index = check_files(folder)
    prefixes = tuple(_prefix(slot) for slot in slots)
    files = {file for name, file in index.items() if name.startswith(prefixes)}
    state: dict[str, Tensor] = {}
    for file in sorted(files):
        state |= read_tensors(Path(folder) / file)
    return _by_slot(state, slots)


def identities(weights: Weights) -> dict[str, str]:
    """The hash of each slot, `sha256:...`, made on several threads over single tensors.

    Raises:
        FolderError: if a tensor has no values here.
    """
    named = [
        (slot, name, tensor) for slot, group in weights.items() for name, tensor in group.items()
    ]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        lines = list(pool.map(lambda item: _line(item[1], item[2]), named))
    found: dict[str, list[str]] = {slot: [] for slot in weights}
    for (slot, _, _), line in zip(named, lines, strict=True):
        found[slot].append(line)
    return {slot: _sha256("\n".join(sorted(group)).encode()) for slot, group in found.items()}


def combined(hashes: Mapping[str, str]) -> str:
    """One hash of several slots' hashes."""
    return _sha256("\n".join(f"{slot} {hashes[slot]}" for slot in sorted(hashes)).encode())


def _line(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise FolderError(
            f"{name}: is on the meta device and has no values to hash; load the model without"
            " offloading, or name its folder instead of the model"
        )
    plain = _canonical(tensor.detach().cpu().contiguous())
    digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{name} {plain.dtype} {list(plain.shape)} {digest}"


def _canonical(tensor: Tensor) -> Tensor:
    """The form that is hashed; bit for bit the same for every dtype that holds the values."""
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.reshape(-1).view(torch.int32)
    # Trained fp32 weights differ from bf16 within the first piece, so they are not read twice.
    if any(bool((piece & _LOW_BITS).any()) for piece in bits.split(_PIECE)):
        return tensor
    return tensor.bfloat16()


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _by_slot(state: Mapping[str, Tensor], slots: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    prefixes = {slot: _prefix(slot) for slot in slots}
    return {
        slot: {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        for slot, prefix in prefixes.items()
    }


def _prefix(slot: str) -> str:
    return f"slots.{slot.replace('.', '__')}."
