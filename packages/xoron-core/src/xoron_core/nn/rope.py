"""One-dimensional rotary position embedding, rotate-half convention.

Footguns:
- Tables are computed from positions at every forward, in fp32, and never kept: a buffer that is not
  saved holds garbage after `from_pretrained`, and a half-precision one breaks beyond 256 positions.
- Rotate-half pairs dimension i with i + d/2. Weights of engines that interleave (2i with 2i + 1)
  need their query and key rows permuted.

Shapes: B rows, H heads, N positions, d width of a head (even).
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """(d/2,) fp32 angular frequencies in radians per position: theta ** (-2i / d).

    Args:
        dim: d, even.
        theta: the base; larger turns slower.
        device: where to make them.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def rotary_tables(positions: Tensor, dim: int, *, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (Su et al., 2021, "RoFormer").

    Args:
        positions: (B, N) integer or float positions.
        dim: d, even.
        theta: the base.

    Returns:
        Two tensors (B, N, d), fp32, each half repeated.
    """
    angles = positions[..., None].float() * inverse_frequencies(dim, theta, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """(..., d) to (..., d): (a, b) becomes (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys.

    Args:
        x: (B, H, N, d).
        cos, sin: (B, N, d) from `rotary_tables`; one batch row serves all.

    Returns:
        (B, H, N, d) in the dtype of `x`; the rotation itself is made in fp32.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos + rotate_half(x) * sin).to(x.dtype)
