"""Rotary positions in two or three dimensions: rows and columns, or time, rows and columns.

The pairs of a head are shared out among the axes, and each axis turns its own with its own set of
frequencies. So every table is a true rotation: norms stay, and attention depends on differences of
positions alone, on each axis. `rope.apply_rotary` applies the tables.

Footgun: M-RoPE (`rope.interleave_axes`) is another thing: one set of frequencies, dealt in turn.

Shapes: B rows, N positions, A axes, d width of a head (even).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xoron_core.errors import ConfigError, SequenceError
from xoron_core.nn.rope import inverse_frequencies


def axial_tables(
    positions: Tensor, dim: int, *, theta: float, widths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of positions with axes (RoFormer's, Su et al. 2021, on each axis).

    Args:
        positions: (B, N, A), of any unit; fractions are fine.
        dim: d.
        theta: the base, for every axis. Small ones suit few positions: 100 for a grid of patches
            (Heo et al. 2024, "Rotary Position Embedding for Vision Transformer").
        widths: how many of the d dimensions each axis turns, even numbers; None is `axis_widths`.

    Returns:
        Two tensors (B, N, d), fp32, each half repeated as `rope.rotary_tables` has them.

    Raises:
        ConfigError: if the widths do not fit the axes or the head.
        SequenceError: if positions have no axes.
    """
    if positions.ndim != 3:
        raise SequenceError(
            f"positions have shape {tuple(positions.shape)}, expected (B, N, A) with A axes"
        )
    axes = positions.shape[-1]
    widths = axis_widths(dim, axes) if widths is None else widths
    if len(widths) != axes or sum(widths) != dim or any(width % 2 for width in widths):
        raise ConfigError(
            f"widths {list(widths)} do not share {dim} dimensions among {axes} axes; give {axes}"
            f" even numbers whose sum is {dim}"
        )
    angles = torch.cat(
        [
            positions[..., axis, None].float() * inverse_frequencies(width, theta, positions.device)
            for axis, width in enumerate(widths)
        ],
        dim=-1,
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def axis_widths(dim: int, axes: int) -> list[int]:
    """Shares the d / 2 pairs of a head as evenly as they go; the first axes get what is left.

    Raises:
        ConfigError: if there are fewer pairs than axes, or d is odd.
    """
    pairs, rest = divmod(dim // 2, axes)
    if dim % 2 or pairs == 0:
        raise ConfigError(
            f"a head of {dim} dimensions cannot turn in {axes} axes; expected an even number of at"
            f" least {2 * axes}"
        )
    return [2 * (pairs + (axis < rest)) for axis in range(axes)]
