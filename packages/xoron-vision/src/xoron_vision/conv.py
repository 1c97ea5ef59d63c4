"""The encoder `conv-vit`: convolutions down to a coarse grid, then a few transformer layers.

Meant for training from random weights. A patch that enters a transformer as raw pixels has to learn
from data what neighbouring pixels have to do with each other; convolutions know, so this encoder
needs far fewer images ("Early Convolutions Help Transformers See Better", Xiao et al. 2021).
Positions are waves added to the features, and 2-D rotary in the layers, so any grid works.

Shapes: M images, H and W pixels, h and w of the grid, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from xoron_core.components import Context, Encoder, Features
from xoron_core.nn.conv import ResBlock2d
from xoron_core.nn.joint_attention import JointBlock
from xoron_core.nn.rope_axes import axial_tables
from xoron_vision.config import ConvVitConfig, Preprocess
from xoron_vision.processing import FixedSize
from xoron_vision.siglip import grid_positions

# Wavelength of the slowest wave, over 2 pi, in features.
_LONGEST = 100.0
# Below what the image says: at 1, 59 % of digits were read after 12,800 images, without waves 64 %.
_AMPLITUDE = 0.3


class ConvVitEncoder(Encoder):
    """Images to one feature for each square of `config.stride` pixels."""

    config: ConvVitConfig

    def __init__(self, config: ConvVitConfig, context: Context) -> None:
        super().__init__(config, context)
        self.feature_size = config.hidden_size
        steps: list[nn.Module] = []
        channels = 3
        for width in config.widths:
            # A thin stroke falls between the strides of a small first kernel.
            kernel = 3 if steps else 5
            steps.append(nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2))
            steps += (nn.GroupNorm(config.norm_groups, width), nn.GELU())
            channels = width
        groups = config.norm_groups
        steps += (
            ResBlock2d(channels, channels, norm_groups=groups) for _ in range(config.num_blocks)
        )
        self.stem = nn.Sequential(*steps)
        self.layers = nn.ModuleList(
            JointBlock(config.hidden_size, config.num_heads, num_streams=1)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    @classmethod
    def processor(cls, config: ConvVitConfig) -> FixedSize:
        """Every image resized to one size; features are squares of `stride` pixels."""
        side = config.image_size
        return FixedSize((side, side), config.stride, config.preprocess or Preprocess())

    def forward(self, pixel_values: Tensor) -> Features:  # type: ignore[override]
        """(M, 3, H, W) to features (M, h * w, D), row by row."""
        grid = self.stem(pixel_values)
        h, w = grid.shape[-2:]
        values = rearrange(grid, "M D h w -> M (h w) D")
        places = grid_positions(torch.tensor([[h, w]], device=values.device), h * w)
        waves = grid_waves(places, values.shape[-1])
        values = values + _AMPLITUDE * waves.to(values.dtype)
        head_dim = self.config.hidden_size // self.config.num_heads
        rope = axial_tables(places, head_dim, theta=self.config.rope_theta)
        for layer in self.layers:
            (values,) = layer(values, ropes=[rope])
        mask = values.new_ones(values.shape[:2], dtype=torch.bool)
        positions = places.expand(len(values), -1, -1)
        return Features(cast(Tensor, self.norm(values)), mask, positions)

    def dummy_batch(self) -> dict[str, Tensor]:
        """One black square of one feature."""
        return {"pixel_values": torch.zeros(1, 3, self.config.stride, self.config.stride)}


def grid_waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of rows and columns, a quarter of the width each, in geometric wavelengths.

    What reads the features can then tell left from right without counting them.

    Args:
        places: (1, h * w, 2) rows and columns.
        width: D, a multiple of 4.

    Returns:
        (1, h * w, D).
    """
    steps = torch.arange(width // 4, device=places.device) / max(1, width // 4 - 1)
    angles = places[..., None] * _LONGEST**-steps
    return rearrange([angles.sin(), angles.cos()], "s M n a f -> M n (s a f)")
