"""The projector `c-abstractor`: locality by convolution, a fixed number of positions by pooling.

Images of different grids share a batch on one canvas. Before every convolution there are zeros
where an image has no patches, so that it sees at its border what it would see alone.

Shapes: M images, E feature width, C inner width, H and W sides of the canvas, h and w of an image's
grid, S side of the pooled grid, D backbone width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xoron_core.components import Context, Features
from xoron_vision.projectors.base import Grid, SizedProjector, grid_of
from xoron_vision.projectors.config import CAbstractorConfig


class ConvBlock(nn.Module):
    """Residual bottleneck: 1 x 1, depthwise 3 x 3, 1 x 1, with norms over channels.

    Args:
        size: C.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.expand = nn.Linear(size, size)
        self.near = nn.Conv2d(size, size, 3, padding=1, groups=size)
        self.norm2 = nn.LayerNorm(size)
        self.reduce = nn.Linear(size, size)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(M, H, W, C) and (M, H, W, 1) bool to (M, H, W, C)."""
        y = torch.where(valid, F.silu(self.expand(self.norm1(x))), 0)
        y = rearrange(self.near(rearrange(y, "m h w c -> m c h w")), "m c h w -> m h w c")
        return x + cast(Tensor, self.reduce(F.silu(self.norm2(y))))


class CAbstractorProjector(SizedProjector):
    """Convolutions, adaptive average pooling to S by S, convolutions, a linear layer."""

    config: CAbstractorConfig

    def __init__(self, config: CAbstractorConfig, context: Context) -> None:
        super().__init__(config, context)
        size = config.hidden_size
        self.side = math.isqrt(config.num_tokens)
        self.input_proj = nn.Linear(self.feature_size, size)
        self.before = nn.ModuleList(ConvBlock(size) for _ in range(config.depth))
        self.after = nn.ModuleList(ConvBlock(size) for _ in range(config.depth))
        self.write = nn.Linear(size, self.output_size)

    def forward(self, features: Features) -> Features:
        """(M, L, E) to (M, S * S, D)."""
        grid = grid_of(features, self.slot)
        x, valid = canvas(features._replace(values=self.input_proj(features.values)), grid)
        for block in self.before:
            x = block(x, valid)
        x = adaptive_pool(x, grid, self.side)
        everywhere = valid.new_ones(1, 1, 1, 1)
        for block in self.after:
            x = block(x, everywhere)
        values = self.write(rearrange(x, "m h w c -> m (h w) c"))
        return Features(values, features.mask.new_ones(values.shape[:2]))

    @classmethod
    def num_positions(cls, config: CAbstractorConfig, num_features: int) -> int:
        """The same for every image."""
        return config.num_tokens


def canvas(features: Features, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lays (M, L, C) features out on (M, H, W, C), zero elsewhere, and (M, H, W, 1) bool."""
    values = features.values
    L = values.shape[1]
    if values.is_meta or not len(
        values
    ):  # there are no sides to read, nor does the result need any
        H = W = L
    else:
        H, W = int(grid.heights.max()), int(grid.widths.max())
    rows, columns = torch.arange(H, device=values.device), torch.arange(W, device=values.device)
    widths = rearrange(grid.widths, "m -> m 1 1")
    inside = (rows[:, None] < rearrange(grid.heights, "m -> m 1 1")) & (columns < widths)
    source = rearrange((rows[:, None] * widths + columns).clamp(max=L - 1), "m h w -> m (h w) 1")
    laid = values.gather(1, source.expand(-1, -1, values.shape[-1]))
    valid = inside[..., None]
    return torch.where(valid, rearrange(laid, "m (h w) c -> m h w c", h=H), 0), valid


def adaptive_pool(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Each image's own h by w corner of (M, H, W, C), averaged to (M, S, S, C).

    As `F.adaptive_avg_pool2d` image by image.
    """
    down = _pool_weights(grid.heights, x.shape[1], side).to(x.dtype)
    across = _pool_weights(grid.widths, x.shape[2], side).to(x.dtype)
    rows = torch.einsum("msh,mhwc->mswc", down, x)
    return torch.einsum("mtw,mswc->mstc", across, rows)


def _pool_weights(sides: Tensor, length: int, pooled: int) -> Tensor:
    """(M,) sides to (M, S, length) weights: bin i covers floor(i n / S) to ceil((i + 1) n / S)."""
    index = torch.arange(pooled, device=sides.device)
    n = sides[:, None]
    start, end = index * n // pooled, ((index + 1) * n + pooled - 1) // pooled
    place = torch.arange(length, device=sides.device)
    inside = (place >= start[..., None]) & (place < end[..., None])
    return inside.float() / (end - start)[..., None]
