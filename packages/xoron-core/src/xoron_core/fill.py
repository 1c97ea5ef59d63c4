"""How media enter a sequence: placeholders become features, codes or queries.

Every media entry of a batch is keyed by the slot that consumes it and carries, beside that
component's tensors, `spans`: (S, 3) int64 with row, start and length of each item's placeholder
positions, in item order. A length that does not match what the component gives is an error with
both numbers; nothing is cut or repeated. For a projector with budgets there are also `counts`, (S,)
int64: how many positions each item is to take.

Shapes: B rows, N positions, D width, M items, K positions of an item, S = M spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xoron_core.components import Codec, Codes, Features
from xoron_core.errors import SequenceError
from xoron_core.flattening import CodeLayout
from xoron_core.tokens.space import TokenSpace

SPANS = "spans"
COUNTS = "counts"


def split_spans(entry: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Separates a media entry's spans from its component's tensors."""
    rest = {key: value for key, value in entry.items() if key not in (SPANS, COUNTS)}
    return entry.get(SPANS), rest


def repeat_rows(entry: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """A media entry for a batch in which each row stands `times` times, one after another."""
    repeated = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in entry.items()}
    if SPANS in repeated:
        spans = repeated[SPANS].clone()
        copy = torch.arange(len(spans), device=spans.device) % times
        spans[:, 0] = spans[:, 0] * times + copy
        repeated[SPANS] = spans
    return repeated


def flat_positions(spans: Tensor, row_length: int) -> Tensor:
    """(S, 3) spans to the flat indices of their positions, in order: (sum of lengths,)."""
    row, start, length = spans.unbind(-1)
    first = row * row_length + start
    offsets = torch.repeat_interleave(length.cumsum(0) - length, length)
    steps = torch.arange(offsets.numel(), device=spans.device) - offsets
    return torch.repeat_interleave(first, length) + steps


def inject(embeds: Tensor, spans: Tensor, tokens: Features, slot: str) -> Tensor:
    """Puts projector outputs at their placeholder positions.

    Args:
        embeds: (B, N, D).
        spans: (M, 3).
        tokens: values (M, K, D) and mask (M, K).
        slot: for the error.

    Returns:
        (B, N, D); rows at the spans are bit-equal to `tokens.values`.
    """
    counts = tokens.mask.sum(-1)
    _check_counts(spans, counts, slot)
    B, N, D = embeds.shape
    values = tokens.values[tokens.mask].to(embeds.dtype)
    flat = embeds.reshape(B * N, D).index_copy(0, flat_positions(spans, N), values)
    return flat.view(B, N, D)


def gather(hidden: Tensor, spans: Tensor, slot: str) -> Tensor:
    """Takes the hidden states of query positions: (B, N, D) to (M, K, D).

    Raises:
        SequenceError: if the spans differ in length.
    """
    lengths = spans[:, 2]
    if not torch.all(lengths == lengths[:1]):
        raise SequenceError(
            f"{slot}: query spans of different lengths {sorted(set(lengths.tolist()))};"
            " a generator reads the same number of positions for every item"
        )
    B, N, D = hidden.shape
    picked = hidden.reshape(B * N, D).index_select(0, flat_positions(spans, N))
    return picked.view(len(spans), -1, D)


@torch.no_grad()
def write_codes(
    tokens: Tensor, spans: Tensor, codes: Codes, *, ranges: list[str], space: TokenSpace, slot: str
) -> Tensor:
    """Writes codec ids at their placeholder positions, in the order that the space declares.

    Args:
        tokens: (B, N) ids, or labels; a copy is returned.
        spans: (M, 3).
        codes: ids (M, T, Q) and mask (M, T).
        ranges: names of the Q ranges.
    """
    ids = CodeLayout(space, ranges).flatten(codes)
    Q = codes.ids.shape[-1]
    _check_counts(spans, codes.mask.sum(-1) * Q, slot)
    B, N = tokens.shape
    return tokens.reshape(-1).index_copy(0, flat_positions(spans, N), ids).view(B, N)


def codec_range_names(codec: type[Codec], config: Any) -> list[str]:
    """Names of a codec's ranges in codebook order."""
    requested = sorted(codec.ranges(config), key=lambda r: r.codebook)
    return [r.full_name for r in requested]


def _check_counts(spans: Tensor, counts: Tensor, slot: str) -> None:
    if len(spans) != len(counts):
        raise SequenceError(
            f"{slot}: {len(spans)} placeholder spans in the sequence but {len(counts)} media items;"
            " give one span per item"
        )
    wrong = (spans[:, 2] != counts).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise SequenceError(
            f"{slot}: item {i} takes {int(counts[i])} positions but its placeholder span has"
            f" {int(spans[i, 2])}"
        )
