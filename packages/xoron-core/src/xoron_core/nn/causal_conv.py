"""One-dimensional convolutions that never look ahead, whole or chunk by chunk.

    CausalConv1d           (M, C, L)  -> (M, C', ceil(L / stride)); step t of the output ends where
                           step t of the input ends, at sample (t + 1) * stride - 1
    CausalConvTranspose1d  (M, C, T)  -> (M, C', T * stride); sample n comes of steps up to
                           n // stride

so a stack of the first and a stack of the second with the same strides are as long as each other,
and the delay of both together is one step (as in SoundStream, Zeghidour et al. 2021).

A stream starts with `init_state` and gives each chunk to `step`; the state is the end of what was
read, and all outputs side by side are those of the whole.

Footguns:
- Before the first sample there are zeros. Published codecs that reflect the beginning into that
  place (EnCodec) look ahead there; these do not.
- `forward` fills the last step up with zeros; a stream takes whole steps only.

Shapes: M items, C channels, L samples, T steps.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.errors import ConfigError, DataError


class CausalConv1d(nn.Module):
    """A convolution padded with zeros on the left.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: in samples, before dilation.
        stride: samples of a step.
        dilation: distance of the kernel's samples.

    Raises:
        ConfigError: if the kernel is shorter than the stride, so that samples would be left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        _check_kernel(kernel_size, stride)
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation
        )
        self.stride = stride
        self.context = (kernel_size - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, L) to (M, C', ceil(L / stride))."""
        return cast(Tensor, self.conv(F.pad(x, (self.context, -x.shape[-1] % self.stride))))

    def init_state(self, num_items: int) -> Tensor:
        """What lies before the first sample: zeros (M, C, context)."""
        return self.conv.weight.new_zeros(num_items, self.conv.in_channels, self.context)

    def step(self, chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk (M, C, l), l a multiple of the stride, to (M, C', l / stride) and the next state.

        Raises:
            DataError: for a chunk that ends inside a step.
        """
        if chunk.shape[-1] % self.stride:
            raise DataError(
                f"a chunk of {chunk.shape[-1]} samples for a convolution of stride {self.stride};"
                " give multiples of it, or the whole to `forward`"
            )
        x = torch.cat([state, chunk], dim=-1)
        return self.conv(x), x[..., x.shape[-1] - self.context :]


class CausalConvTranspose1d(nn.Module):
    """A transposed convolution whose end, which later steps would add to, is cut off.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: in samples of the output.
        stride: samples of a step.

    Raises:
        ConfigError: if the kernel is shorter than the stride, so that samples would be left out.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int
    ) -> None:
        super().__init__()
        _check_kernel(kernel_size, stride)
        self.conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride=stride)
        self.stride = stride
        self.context = (kernel_size - 1) // stride

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, T) to (M, C', T * stride)."""
        return cast(Tensor, self.conv(x))[..., : x.shape[-1] * self.stride]

    def init_state(self, num_items: int) -> Tensor:
        """What lies before the first step: zeros (M, C, context)."""
        return self.conv.weight.new_zeros(num_items, self.conv.in_channels, self.context)

    def step(self, chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk (M, C, t) to (M, C', t * stride) and the next state."""
        x = torch.cat([state, chunk], dim=-1)
        return self(x)[..., self.context * self.stride :], x[..., x.shape[-1] - self.context :]


def _check_kernel(kernel_size: int, stride: int) -> None:
    if not 1 <= stride <= kernel_size:
        raise ConfigError(
            f"causal convolution: a kernel of {kernel_size} samples with a stride of {stride};"
            " expected a stride of at least 1 and a kernel that is no shorter"
        )
