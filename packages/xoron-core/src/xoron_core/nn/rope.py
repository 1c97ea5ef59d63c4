"""Rotary position embedding in one or three dimensions, rotate-half convention.

Footguns:
- Tables are computed from positions at every forward, in fp32, and never kept: a buffer that is not
  saved holds garbage after `from_pretrained`, and a half-precision one breaks beyond 256 positions.
- Rotate-half pairs dimension i with i + d/2. Weights of engines that interleave (2i with 2i + 1)
  need their query and key rows permuted (`rotate_half_rows`).
- "Interleaved" M-RoPE is about axes, not pairs: frequencies go time, height, width, time, ... so
  that each axis has fast and slow ones.

Shapes: B rows, H heads, N positions, d width of a head (even).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xoron_core.errors import SequenceError


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """(d/2,) fp32 angular frequencies in radians per position: theta ** (-2i / d).

    Args:
        dim: d, even.
        theta: the base; larger turns slower.
        device: where to make them.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def rotary_tables(
    positions: Tensor,
    dim: int,
    *,
    theta: float,
    frequencies: Tensor | None = None,
    factor: float = 1.0,
    sections: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (Su et al., 2021, "RoFormer").

    Args:
        positions: (B, N) integer or float positions; with `sections` also (3, B, N).
        dim: d, even.
        theta: the base.
        frequencies: (d/2,) or (B, 1, d/2) instead of those of the base, see `rope_scaling`.
        factor: what both tables are multiplied with.
        sections: how many frequencies time, height and width get, see `interleave_axes`.

    Returns:
        Two tensors (B, N, d), fp32, each half repeated.

    Raises:
        SequenceError: for positions with axes where no sections are declared.
    """
    if frequencies is None:
        frequencies = inverse_frequencies(dim, theta, positions.device)
    angles = positions[..., None].float() * frequencies
    if positions.ndim == 3:
        if sections is None:
            raise SequenceError(
                f"position_ids have shape {tuple(positions.shape)}, expected (B, N): this model"
                " has one position axis; declare mrope_section for time, height and width"
            )
        angles = interleave_axes(angles, sections)
    angles = torch.cat((angles, angles), dim=-1)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def interleave_axes(angles: Tensor, sections: Sequence[int]) -> Tensor:
    """Gives each frequency one of three axes in turn (interleaved M-RoPE; Qwen3-VL, 2025).

    Frequency i belongs to height if i % 3 is 1 and width if i % 3 is 2, each until its section is
    used up, and to time otherwise. With equal positions on all axes this is 1-D RoPE.

    Args:
        angles: (3, B, N, d/2).
        sections: frequencies of time, height and width; their sum is d/2.

    Returns:
        (B, N, d/2).
    """
    index = torch.arange(angles.shape[-1], device=angles.device)
    time, height, width = angles
    is_height = (index % 3 == 1) & (index < 3 * sections[1])
    is_width = (index % 3 == 2) & (index < 3 * sections[2])
    return torch.where(is_height, height, torch.where(is_width, width, time))


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


def rotate_half_rows(dim: int) -> Tensor:
    """(d,) int64: rows of an interleaved projection, in the order that rotate-half takes them.

    `weight[rotate_half_rows(d)]` turns the d rotated rows of a head; `argsort` turns them back.
    """
    return torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
