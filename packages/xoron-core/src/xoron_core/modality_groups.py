"""Which modality each position of a batch belongs to, so that a backbone can observe them apart.

Group 0 is text, special tokens included; the others are the modalities of the composition in the
order of its slots. A position belongs to a modality if it lies in a span of that modality's media
(placeholders, codes, a generator's queries) or holds an id of one of its codec ranges.

Footguns:
- The number of groups follows from the composition alone: processes whose batches hold other media
  still send tensors of one shape.

Shapes: B rows, N positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xoron_core import fill
from xoron_core.composer.composition import Composition
from xoron_core.tokens.space import TokenSpace

TEXT = "text"


def group_names(composition: Composition) -> tuple[str, ...]:
    """`text`, then each other modality of the composition once."""
    found = (slot.modality for slot in composition.slots.values() if slot.modality)
    return tuple(dict.fromkeys((TEXT, *found)))


def position_groups(
    embeds: Tensor,
    input_ids: Tensor | None,
    media: Mapping[str, Mapping[str, Any]],
    *,
    composition: Composition,
    space: TokenSpace | None,
) -> Tensor:
    """The group of each position.

    Args:
        embeds: (B, N, D), for shape and device.
        input_ids: (B, N), or None where only embeddings are given.
        media: slot to its tensors and `spans` (see `xoron_core.fill`).
        composition: names the modality of each slot.
        space: names the modality of each codec range.

    Returns:
        (B, N) int64, indices into `group_names`.
    """
    names = {name: index for index, name in enumerate(group_names(composition))}
    groups = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    if input_ids is not None and space is not None:
        for entry in space.codecs:
            first, last = entry.start, entry.start + entry.range.size - 1
            inside = (input_ids >= first) & (input_ids <= last)
            groups.masked_fill_(inside, names.get(entry.range.modality, 0))
    for slot, tensors in media.items():
        spans, _ = fill.split_spans(tensors)
        if spans is not None:
            at = fill.flat_positions(spans, groups.shape[1])
            groups.view(-1).index_fill_(0, at, names[composition.slots[slot].modality])
    return groups
