"""Finite scalar quantisation: a vector of few numbers, each rounded to one of a few levels.

    z (..., d) -> tanh, scaled to the levels of each number -> rounded -> codes (..., d) in [-1, 1]
                                                                      -> one id in 0 .. C - 1

(Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple".) There is no codebook to
learn and none that can collapse: the gradient passes straight through the rounding.

Footguns:
- The arithmetic is fp32 whatever comes in, also under autocast: in bfloat16 nearly all ids of a
  large product come out wrong.
- With an even number of levels the codes are not symmetric: 4 levels are -1, -0.5, 0 and 0.5.
- The first number is the fastest: id = sum of level i times the product of the levels before i.

Shapes: (..., d) any leading axes, d numbers of a code, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xoron_core.errors import ConfigError

# The outermost levels are reached, not only approached, by the tanh.
EPS = 1e-3
# Beyond, EPS alone would carry the tanh past the outermost level.
LEVELS_RANGE = (3, 256)


class FsqOutput(NamedTuple):
    """Attributes: codes (..., d) in the input's dtype, with its gradient; indices (...) int64."""

    codes: Tensor
    indices: Tensor


class FSQ(nn.Module):
    """Rounds each of d numbers to its own number of levels. It has no parameters.

    Args:
        levels: of each number, from 3 to 256; their product is C. [8, 8, 8, 16] makes 8,192 codes.

    Raises:
        ConfigError: for levels out of range.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        check_levels(levels)
        self.num_codes = math.prod(levels)
        # Not buffers: they follow from the config, and a load would leave such ones uninitialised.
        self._levels = tuple(levels)
        self._basis = tuple(math.prod(levels[:i]) for i in range(len(levels)))

    @property
    def dim(self) -> int:
        """d."""
        return len(self._levels)

    def forward(self, z: Tensor) -> FsqOutput:
        """(..., d) of any size to codes and indices."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(z.float())
            rounded = bounded + (bounded.round() - bounded).detach()
            codes = rounded / self._half_width(z)
            return FsqOutput(codes.to(z.dtype), self.codes_to_indices(codes.detach()))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes (..., d), fp32, to indices (...) int64."""
        half = self._half_width(codes)
        digits = (codes.float() * half + half).round().long()
        return (digits * self._table(self._basis, codes)).sum(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices (...) in 0 .. C - 1 to codes (..., d) fp32."""
        levels, basis = (self._table(t, indices) for t in (self._levels, self._basis))
        half = self._half_width(indices)
        return (indices[..., None] // basis % levels - half).float() / half

    def _bound(self, z: Tensor) -> Tensor:
        """To the interval that rounds to the levels; zero stays on a level where they are even."""
        levels = self._table(self._levels, z)
        half = (levels - 1) * (1 + EPS) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return (z + (offset / half).atanh()).tanh() * half - offset

    def _half_width(self, like: Tensor) -> Tensor:
        return self._table(self._levels, like) // 2

    @staticmethod
    def _table(values: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)

    def extra_repr(self) -> str:
        return str(list(self._levels))


def check_levels(levels: Sequence[int]) -> None:
    """Refuses levels that cannot be rounded to.

    Raises:
        ConfigError: saying which.
    """
    least, most = LEVELS_RANGE
    if not levels or (wrong := [n for n in levels if not least <= n <= most]):
        found = wrong if levels else "none"
        raise ConfigError(
            f"fsq: levels {found}, expected at least one, each from {least} to {most}; the product"
            " is the number of codes, so split a large one in two"
        )
