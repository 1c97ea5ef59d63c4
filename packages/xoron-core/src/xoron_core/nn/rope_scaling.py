"""Rotary positions beyond the trained length: YaRN and LongRoPE.

YaRN leaves the fast frequencies as they are (they have turned many times within the trained
length), divides the slow ones by the factor, and blends between; LongRoPE divides each frequency by
a searched factor of its own. Both sharpen attention a little for the longer context.

Footguns:
- It is the *low* frequencies that are interpolated. The other way round a model still runs.
- `mscale` with an equal `mscale_all_dim` moves YaRN's sharpening from the tables into the scores
  (`logit_factor`), where it also reaches dimensions that carry no position.
- LongRoPE has two factor sets, chosen per row by its largest position, as published. Keys cached
  before a row passes the trained length keep the short set: with different sets, a cached
  continuation over that edge differs from one forward pass. Equal sets have no such edge.

Shapes: B rows, N positions, d rotated width of a head (even).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xoron_core.errors import ConfigError
from xoron_core.nn.rope import inverse_frequencies, rotary_tables

KINDS = ("default", "yarn", "longrope")


def yarn_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """YaRN's angular frequencies (Peng et al., 2023).

    Args:
        dim: d, even.
        theta: the base.
        factor: s, new length over trained length, at least 1.
        original_length: trained length in positions.
        beta_fast: dimensions that turn more often than this within it are kept.
        beta_slow: dimensions that turn less often than this are divided by the factor.
        truncate: whether the ends of the blend are whole dimensions, as in the published code.
        device: where to make them.

    Returns:
        (d/2,) fp32, radians per position.
    """

    def dimension(turns: float) -> float:
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    # The width is kept off zero where both ends fall on one dimension.
    slow = ((index - low) / (high - low or 0.001)).clamp(0, 1)
    kept = inverse_frequencies(dim, theta, device)
    return kept / factor * slow + kept * (1 - slow)


def longrope_frequencies(
    dim: int, theta: float, *, factors: Sequence[float], device: torch.device | None = None
) -> Tensor:
    """LongRoPE's angular frequencies (Ding et al., 2024): each divided by its own factor.

    Args:
        dim: d, even.
        theta: the base.
        factors: d/2 numbers.
        device: where to make them.

    Returns:
        (d/2,) fp32, radians per position.
    """
    return inverse_frequencies(dim, theta, device) / torch.tensor(
        list(factors), dtype=torch.float32, device=device
    )


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor 0.1 m ln s + 1, by which queries and keys grow each; 1 for s <= 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_temperature(factor: float, original_length: int) -> float:
    """LongRoPE's attention factor sqrt(1 + ln s / ln L) of a trained length L; 1 for s <= 1."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


@dataclass(frozen=True)
class Rotary:
    """One model's rotary embedding; holds numbers only, so that no buffer can go stale.

    Attributes:
        dim: d, even.
        theta: the base.
        kind: one of `KINDS`.
        parameters: of the kind, under transformers' names: `factor`,
            `original_max_position_embeddings`, `attention_factor`, and `beta_fast`, `beta_slow`,
            `truncate`, `mscale`, `mscale_all_dim` (yarn) or `short_factor`, `long_factor`
            (longrope).
        sections: frequencies given to time, height and width where positions are (3, B, N); they
            sum to d/2. None takes (B, N) positions only.
    """

    dim: int
    theta: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"rope_type {self.kind!r} is not supported, expected one of {', '.join(KINDS)}"
            )

    @property
    def table_factor(self) -> float:
        """What cosine and sine are multiplied with."""
        given = self.parameters
        if self.kind == "default":
            return 1.0
        if given.get("attention_factor") is not None:
            return float(given["attention_factor"])
        if self.kind == "longrope":
            return longrope_temperature(self._factor, self._original)
        over, under = given.get("mscale"), given.get("mscale_all_dim")
        if over and under:
            return yarn_temperature(self._factor, over) / yarn_temperature(self._factor, under)
        return yarn_temperature(self._factor)

    @property
    def logit_factor(self) -> float:
        """What latent attention's scores are multiplied with beside 1 / sqrt(d)."""
        under = self.parameters.get("mscale_all_dim")
        if self.kind == "default" or not under:
            return 1.0
        return yarn_temperature(self._factor, under) ** 2

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of these positions.

        Args:
            positions: (B, N), or (3, B, N) for time, height and width.

        Returns:
            Two tensors (B, N, d), fp32.
        """
        return rotary_tables(
            positions,
            self.dim,
            theta=self.theta,
            frequencies=self._frequencies(positions),
            factor=self.table_factor,
            sections=self.sections,
        )

    @property
    def _original(self) -> int:
        return int(self.parameters["original_max_position_embeddings"])

    @property
    def _factor(self) -> float:
        return float(self.parameters["factor"])

    def _frequencies(self, positions: Tensor) -> Tensor | None:
        """(d/2,), or (B, 1, d/2) where each row has its own; None for the plain ones."""
        given, device = self.parameters, positions.device
        if self.kind == "yarn":
            return yarn_frequencies(
                self.dim,
                self.theta,
                factor=self._factor,
                original_length=self._original,
                beta_fast=given.get("beta_fast") or 32.0,
                beta_slow=given.get("beta_slow") or 1.0,
                truncate=given.get("truncate", True),
                device=device,
            )
        if self.kind == "longrope":
            short, long = (
                longrope_frequencies(self.dim, self.theta, factors=given[name], device=device)
                for name in ("short_factor", "long_factor")
            )
            rows = positions if positions.ndim == 2 else positions.amax(0)
            beyond = rows.amax(-1) >= self._original
            return torch.where(beyond[:, None, None], long, short)
        return None
