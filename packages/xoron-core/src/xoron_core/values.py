"""What the parts of a model hand to each other.

Legend of shapes: B batch rows, N positions of a sequence, D backbone width, M media items,
L features of one item, E feature width, T frames or steps, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from xoron_core.tokens.space import TokenSpace


@dataclass(frozen=True)
class Context:
    """What a component may know of its composition while it is built.

    Attributes:
        slot: the slot it fills, e.g. `image.encoder`.
        hidden_size: D of the backbone, or None where there is none.
        feature_size: E of the encoder of the same modality, or None.
        space: the token space, or None where no tokenizer and no codec is composed.
        parts: the components built before this one, by slot (`{ref: slot}` names one).
        fusion_layers: where the backbone takes a fusion; only a fusion is told.
    """

    slot: str
    hidden_size: int | None = None
    feature_size: int | None = None
    space: TokenSpace | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    fusion_layers: tuple[int, ...] = ()


class LossTerm(NamedTuple):
    """A loss as a sum and the count it is to be divided by, globally, by whoever trains.

    Attributes:
        sum: scalar, differentiable.
        count: scalar without gradient.
        metrics: name to (sum, count), without gradient.
    """

    sum: Tensor
    # Shadows tuple.count: it has to be a tuple, or FSDP's walk over outputs misses the tensors.
    count: Tensor  # type: ignore[assignment]
    metrics: Mapping[str, tuple[Tensor, Tensor]] = {}


class Features(NamedTuple):
    """Encoder or projector output.

    Attributes:
        values: (M, L, E).
        mask: (M, L) bool, True where valid.
        positions: (M, L, A) with A axes, fp32, or None.
    """

    values: Tensor
    mask: Tensor
    positions: Tensor | None = None


class Codes(NamedTuple):
    """Codec output: what a sequence carries, and what decoding needs beside it.

    Attributes:
        ids: (M, T, Q) int64, local to each codebook.
        mask: (M, T) bool, True where valid.
        metadata: one JSON-able mapping per item.
    """

    ids: Tensor
    mask: Tensor
    metadata: Sequence[Mapping[str, Any]]


class Cost(NamedTuple):
    """What one batch takes: sequence positions, floating-point operations, activation bytes."""

    positions: int
    flops: int
    activation_bytes: int


class BackboneOutput(NamedTuple):
    """Attributes: hidden (B, N, D); cache, or None when caching is off; its own losses, counted as
    in `Backbone.loss_counts`; while training, statistics (sums) for `after_optimizer_step`."""

    hidden: Tensor
    cache: Any = None
    losses: Mapping[str, LossTerm] = {}
    statistics: Mapping[str, Tensor] = {}
