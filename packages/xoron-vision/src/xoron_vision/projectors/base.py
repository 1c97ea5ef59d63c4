"""What the projectors share: their widths, two-layer networks, and the grid that patches lie on.

Features of an encoder with positions are the patches of each image row by row, padded to the
longest; the grid of an image is read from its positions, so images of different shapes share a
batch.

Shapes: M images, L features, E their width, D width of results, h and w sides of an image's grid,
r side of a square of patches, K squares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from xoron_core.components import Context, Features, Projector
from xoron_core.errors import CompositionError, SequenceError
from xoron_vision.projectors.config import ProjectorConfig


class SizedProjector(Projector):
    """Knows E and D: `feature_size`, and `output_size` from the backbone or the config."""

    def __init__(self, config: ProjectorConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.feature_size is None:
            raise CompositionError(
                f"slot {self.slot!r}: a projector needs the encoder whose features it reads"
            )
        self.feature_size = context.feature_size
        self.output_size = context.hidden_size or config.output_size or context.feature_size


def two_layers(input_size: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(
        nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, output_size)
    )


class Grid(NamedTuple):
    """The grids of a batch: heights and widths, each (M,) int64."""

    heights: Tensor
    widths: Tensor


def grid_of(features: Features, slot: str, *, factor: int = 1) -> Grid:
    """Reads every image's grid from its positions.

    Args:
        features: with positions (M, L, 2).
        slot: for errors.
        factor: what both sides must be multiples of.

    Raises:
        CompositionError: if the encoder gives no grid.
        SequenceError: if a grid has holes or other sides.
    """
    if features.positions is None or features.positions.shape[-1] != 2:
        raise CompositionError(
            f"slot {slot!r}: needs features on a grid of patches, and this encoder gives none; use"
            " projector: {use: perceiver} or {use: mlp}"
        )
    last = features.positions.masked_fill(~features.mask[..., None], 0).amax(1).long()
    grid = Grid(last[:, 0] + 1, last[:, 1] + 1)
    if features.values.is_meta:
        return grid
    if bool((grid.heights * grid.widths != features.mask.sum(-1)).any()):
        raise SequenceError(f"slot {slot!r}: the features of an image are no whole grid")
    off = ((grid.heights % factor != 0) | (grid.widths % factor != 0)).nonzero()
    if len(off):
        h, w = int(grid.heights[off[0, 0]]), int(grid.widths[off[0, 0]])
        raise SequenceError(
            f"slot {slot!r}: a grid of {h} x {w} patches does not divide into squares of {factor};"
            " choose another factor, or an image_size whose grid is a multiple of it"
        )
    return grid


def squares(features: Features, slot: str, factor: int) -> tuple[Tensor, Tensor]:
    """Groups neighbouring patches, for all images at once.

    Returns:
        (M, K, r * r, E) features and (M, K) bool, K = L // r².
    """
    grid = grid_of(features, slot, factor=factor)
    L = features.values.shape[1]
    across = rearrange(grid.widths, "m -> m 1")
    index = torch.arange(max(1, L // factor**2), device=features.values.device)
    row, column = index // (across // factor) * factor, index % (across // factor) * factor
    inner = torch.arange(factor, device=index.device)
    rows = rearrange(row, "m k -> m k 1 1") + rearrange(inner, "a -> a 1")
    columns = rearrange(column, "m k -> m k 1 1") + inner
    source = rearrange(rows * across[..., None, None] + columns, "m k a b -> m (k a b)")
    source = source.clamp(max=L - 1)
    picked = features.values.gather(1, source[..., None].expand(-1, -1, features.values.shape[-1]))
    mask = index < (features.mask.sum(-1, keepdim=True) // factor**2)
    return rearrange(picked, "m (k c) e -> m k c e", c=factor**2), mask


def check_divides(factor: int, num_features: int) -> int:
    """K of an image.

    Raises:
        SequenceError: if its patches do not divide into squares.
    """
    if num_features % factor**2:
        raise SequenceError(
            f"{num_features} patches do not divide into squares of {factor} x {factor}; choose"
            " another factor, or an image_size whose grid is a multiple of it"
        )
    return num_features // factor**2
