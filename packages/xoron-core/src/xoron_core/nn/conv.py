"""Two-dimensional convolution blocks of autoencoders: residual, attention, down- and upsampling.

The blocks of the KL autoencoder family (Rombach et al. 2022, "High-Resolution Image Synthesis with
Latent Diffusion Models"): group norm with epsilon 1e-6, SiLU, 3 by 3 convolutions.

Footguns:
- `Downsample2d` pads a zero column at the right and a zero row at the bottom, and nothing at the
  left and the top, as published weights expect; symmetric padding shifts what they see.
- `AttentionBlock2d` lets every place look at every other: its cost grows with (H W) squared.

Shapes: M items, C channels, H and W rows and columns.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xoron_core.nn.kernels import sdpa

NORM_EPS = 1e-6


class ResBlock2d(nn.Module):
    """Two normalised convolutions beside the identity, or a 1 by 1 convolution where C changes.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        norm_groups: of both group norms, dividing both.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_channels, H, W) to (M, out_channels, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return cast(Tensor, self.shortcut(x) + hidden)


class AttentionBlock2d(nn.Module):
    """Attention of one head over all places, normalised before and beside the identity.

    Args:
        channels: C.
        norm_groups: of the group norm, dividing C.
    """

    def __init__(self, channels: int, *, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, H, W) to (M, C, H, W)."""
        places = rearrange(self.norm(x), "M C H W -> M 1 (H W) C")
        attended = sdpa(self.q_proj(places), self.k_proj(places), self.v_proj(places))
        out = rearrange(self.o_proj(attended), "M 1 (H W) C -> M C H W", H=x.shape[-2])
        return x + out


class Downsample2d(nn.Module):
    """A convolution of stride 2 that pads at the right and the bottom alone.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, H, W) to (M, C, H // 2, W // 2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample2d(nn.Module):
    """Every place four times (nearest), then a convolution.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, H, W) to (M, C, 2 H, 2 W)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
