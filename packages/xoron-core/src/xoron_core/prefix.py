"""Reuse of a cached prefix: what an earlier request has in common with this one is not run again.

A `PrefixCache` keeps the cache of one sequence: a system prompt, or the conversation so far. A
request takes over as many positions as agree with it, ids and media alike, and at the end of a
single conversation leaves its own cache behind, so that a chat runs only what is new. Several
conversations at once share what they have in common, which is run once for all.

Footguns:
- It belongs to one model with the weights that it has: `clear()` it after training a step.
- Media agree if their tensors are bit-equal; media that the model itself made are run again.

Shapes: B rows, N positions of the padded batch, L positions that are shared.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xoron_core.caches import CacheOptions, Lane, cut_by_columns
from xoron_core.errors import ConfigError
from xoron_core.model import XoronModel

Key = Hashable


class PrefixCache:
    """The cache of one sequence, for `Session.stream(..., prefix=)`.

    Attributes:
        reused: positions taken over so far, over all rows.
        ran: prompt positions that had to be run.
    """

    def __init__(self) -> None:
        self.reused = self.ran = 0
        self._model: XoronModel | None = None
        self._keys: list[Key] = []
        self._cache: Any = None

    def __len__(self) -> int:
        return len(self._keys)

    def clear(self) -> None:
        """Forgets the sequence; the counts stay."""
        self._keys, self._cache, self._model = [], None, None

    def keep(self, model: XoronModel, keys: Sequence[Key], cache: Any) -> None:
        """Takes the cache of a sequence, if it is whole: an interrupted pass leaves it uneven."""
        self.clear()
        if keys and cut_by_columns(cache, len(keys)):
            self._model, self._keys, self._cache = model, list(keys), cache

    def start(self, model: XoronModel, batch: dict[str, Any], capacity: int) -> Prompt:
        """Splits a left-padded batch into what is cached already and what must be run.

        Raises:
            ConfigError: if this object was used with another model.
        """
        if self._model is not None and self._model is not model:
            raise ConfigError(
                "this PrefixCache holds another model's cache; use one per model, or clear() it"
            )
        keys = row_keys(batch)
        lane = Lane(model, CacheOptions(), capacity)
        if len(keys) > 1:
            lane, shared = self._share(lane, batch, keys, capacity)
        else:
            lane, shared = self._take(lane, keys, capacity)
        length = lane.length
        rest = _drop(batch, length) if length else batch
        rows = len(keys)
        self.reused += shared
        self.ran += lane.positions + int(rest["attention_mask"].numel())
        ids, mask = rest["input_ids"], rest["attention_mask"]
        if length:
            # All rows agree there, so the first one's ids stand for all.
            head = batch["input_ids"][:1, -len(keys[0]) :][:, :length].expand(rows, -1)
            ids = torch.cat([head, ids], dim=1)
            mask = torch.cat([mask.new_ones(rows, length), mask], dim=1)
        return Prompt(lane, rest, ids, mask, keys, shared)

    def _take(self, lane: Lane, keys: list[list[Key]], capacity: int) -> tuple[Lane, int]:
        """For one row: the kept cache itself, cropped; it comes back by `keep`."""
        length = _agreement([self._keys, *keys], keys)
        if not length:
            return lane, 0
        taken = Lane(lane.model, lane.options, capacity, cache=self._cache, length=len(self._keys))
        self.clear()
        taken.crop(taken.length - length)
        return taken, length

    def _share(
        self, lane: Lane, batch: dict[str, Any], keys: list[list[Key]], capacity: int
    ) -> tuple[Lane, int]:
        """For several rows: a copy for each, after running once what only they have in common."""
        model, kept = lane.model, _agreement([self._keys, *keys], keys)
        common = _agreement(keys, keys)
        media = next((i for i in range(kept, common) if isinstance(keys[0][i], tuple)), common)
        common = max(kept, media)
        if not common:
            return lane, 0
        whole = len(self._keys)
        if kept:
            cache = copy.deepcopy(self._cache)
            one = Lane(model, lane.options, capacity, cache=cache, length=whole)
            one.crop(whole - kept)
        else:
            one = lane
        if common > kept:
            ids = batch["input_ids"][:1, -len(keys[0]) :][:, kept:common]
            one.run(batch["attention_mask"].new_ones(1, common), input_ids=ids)
            self.keep(model, keys[0][:common], copy.deepcopy(one.cache))
        one.cache.batch_repeat_interleave(len(keys))
        return one, common * len(keys) - one.positions


class Prompt:
    """A prompt that is partly cached.

    Attributes:
        lane: the model with the shared part in its cache.
        rest: the batch of the columns that are left to run.
        ids, mask: (B, C) of all columns, shared ones first.
        keys: what stands at each valid position of each row.
        reused: positions that were not run, over all rows.
    """

    def __init__(
        self,
        lane: Lane,
        rest: dict[str, Any],
        ids: Tensor,
        mask: Tensor,
        keys: list[list[Key]],
        reused: int,
    ) -> None:
        self.lane, self.rest, self.ids, self.mask = lane, rest, ids, mask
        self.keys, self.reused = keys, reused


def row_keys(batch: Mapping[str, Any]) -> list[list[Key]]:
    """What stands at each valid position: an id, or (digest of a medium, offset in its span)."""
    keys: list[list[Key]] = [list(row) for row in batch["input_ids"].tolist()]
    for slot, entry in (batch.get("media") or {}).items():
        tensors = {name: tensor for name, tensor in entry.items() if name != "spans"}
        for item, (row, start, length) in enumerate(entry["spans"].tolist()):
            digest = _digest(slot, {name: tensor[item] for name, tensor in tensors.items()})
            keys[row][start : start + length] = [(digest, offset) for offset in range(length)]
    valid = batch["attention_mask"].bool().tolist()
    return [
        [key for key, is_valid in zip(row, flags, strict=True) if is_valid]
        for row, flags in zip(keys, valid, strict=True)
    ]


def _agreement(sequences: Sequence[Sequence[Key]], rows: Sequence[Sequence[Key]]) -> int:
    """Positions that all begin with. It leaves every row one to run, and cuts no medium."""
    length = min(len(sequence) for sequence in sequences)
    length = min(length, min(len(row) for row in rows) - 1)
    first = sequences[0]
    for other in sequences[1:]:
        pairs = zip(first[:length], other[:length], strict=True)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
    while length > 0 and any(_inside(row[length]) for row in rows):
        length -= 1
    return max(0, length)


def _inside(key: Key) -> bool:
    return isinstance(key, tuple) and key[1] > 0


def _digest(slot: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(slot.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(raw.numpy().tobytes())
    return found.hexdigest()


def _drop(batch: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The batch without the first `length` valid positions of each row, left-padded anew."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width = int(mask.sum(-1).max()) - length
    # Rows are padded on the left, so the last columns hold every row's rest; a shorter row's
    # columns among them that were dropped become padding.
    starts = mask.shape[1] - mask.sum(-1) + length
    column = torch.arange(mask.shape[1], device=mask.device)
    rest_mask = mask * (column[None, :] >= starts[:, None])
    rest: dict[str, Any] = {
        "input_ids": ids[:, -width:],
        "attention_mask": rest_mask[:, -width:],
    }
    media = {}
    for slot, entry in (batch.get("media") or {}).items():
        spans = entry["spans"]
        left = spans[:, 1] >= starts[spans[:, 0]]
        if bool(left.any()):
            moved = spans[left].clone()
            moved[:, 1] -= mask.shape[1] - width
            media[slot] = {name: tensor[left] for name, tensor in entry.items()} | {"spans": moved}
    if media:
        rest["media"] = media
    return rest
