"""The networks of `rvq-audio`: causal convolutions down to frames, and up to samples again.

    encoder  (M, 1, T * hop) -> conv -> levels [residual units, activation, strided conv]
               -> activation, conv -> (M, D, T)
    decoder  (M, D, T) -> conv -> levels [activation, transposed conv, residual units]
               -> activation, conv -> (M, 1, T * hop)

The units are those of DAC (Kumar et al. 2023, "High-Fidelity Audio Compression with Improved
RVQGAN"), made causal as in SoundStream (Zeghidour et al. 2021), without weight normalisation. Frame
t of the encoder ends with sample (t + 1) * hop - 1, and sample n of the decoder comes of frames up
to n // hop, so what is longer changes no frame and no sample before.

Footgun: samples of root mean square 1 suit them best.

Shapes: M items, D numbers of a code, W channels, L samples of a level, T frames.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from xoron_audio.codec.config import RvqAudioConfig
from xoron_core.nn.causal_conv import CausalConv1d, CausalConvTranspose1d


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha with an alpha of its own for each channel (Ziyin et al. 2020).

    The logarithm of alpha is learned, so that alpha stays above zero.

    Args:
        channels: W.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(M, W, L) to (M, W, L)."""
        alpha = self.log_alpha.exp()
        return x + (alpha * x).sin().square() / alpha


class ResidualUnit(nn.Module):
    """A dilated convolution and one of a single sample, beside the identity.

    Args:
        channels: W.
        config: kernel size and activation.
        dilation: of the first convolution.
    """

    def __init__(self, channels: int, config: RvqAudioConfig, *, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            activation(config, channels),
            CausalConv1d(channels, channels, kernel_size=config.kernel_size, dilation=dilation),
            activation(config, channels),
            CausalConv1d(channels, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(M, W, L) to (M, W, L)."""
        return cast(Tensor, x + self.layers(x))


def initialise(module: nn.Module) -> None:
    """Keeps the variance from layer to layer, and lets residual units begin as the identity.

    torch's own start divides it by three at every layer: what comes to the quantiser is then nearly
    the same at all times, and everything ends in one code.
    """
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        # Each output of a transposed convolution sees a stride-th of the kernel.
        seen = module.kernel_size[0] / (module.stride[0] if module.transposed else 1)
        nn.init.normal_(module.weight, std=(module.in_channels * seen) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, ResidualUnit):  # after its convolutions
        nn.init.zeros_(cast(CausalConv1d, module.layers[-1]).conv.weight)


def activation(config: RvqAudioConfig, channels: int) -> nn.Module:
    """The activation that a config names."""
    return Snake(channels) if config.activation == "snake" else nn.ELU()


def encoder(config: RvqAudioConfig) -> nn.Sequential:
    """(M, 1, T * hop) to (M, D, T)."""
    widths, kernel_size = config.widths, config.kernel_size
    layers: list[nn.Module] = [CausalConv1d(1, widths[0], kernel_size=kernel_size)]
    for (narrow, wide), stride in zip(pairwise(widths), config.strides, strict=True):
        layers += _units(narrow, config)
        layers += (
            activation(config, narrow),
            CausalConv1d(narrow, wide, kernel_size=2 * stride, stride=stride),
        )
    layers += (
        activation(config, widths[-1]),
        CausalConv1d(widths[-1], config.code_dim, kernel_size=3),
    )
    return nn.Sequential(*layers)


def decoder(config: RvqAudioConfig) -> nn.Sequential:
    """(M, D, T) to (M, 1, T * hop)."""
    widths, kernel_size = config.widths[::-1], config.kernel_size
    layers: list[nn.Module] = [CausalConv1d(config.code_dim, widths[0], kernel_size=kernel_size)]
    for (wide, narrow), stride in zip(pairwise(widths), config.strides[::-1], strict=True):
        layers += (
            activation(config, wide),
            CausalConvTranspose1d(wide, narrow, kernel_size=2 * stride, stride=stride),
        )
        layers += _units(narrow, config)
    layers += (activation(config, widths[-1]), CausalConv1d(widths[-1], 1, kernel_size=kernel_size))
    return nn.Sequential(*layers)


def _units(channels: int, config: RvqAudioConfig) -> list[nn.Module]:
    return [ResidualUnit(channels, config, dilation=dilation) for dilation in config.dilations]
