"""Where an autoencoder's latents lie: a scale and a shift that are saved with its weights.

Generators need latents of about unit deviation. Without a stored scale, the one that was trained
with cannot be known afterwards.

Shapes: M items, C channels, h and w latents down and across.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from xoron_core.errors import DataError


class LatentScale(nn.Module):
    """(latents - shift) * scale, channel by channel, in fp32.

    Args:
        channels: C.
        scale: one number, or one for each channel.
        shift: the same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        channels: int,
        *,
        scale: float | Sequence[float] = 1.0,
        shift: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale).expand(channels).clone())
        self.register_buffer("shift", torch.tensor(shift).expand(channels).clone())

    def apply_to(self, latents: Tensor) -> Tensor:
        """(M, C, h, w) of the encoder to scaled ones."""
        scale, shift = self._tables()
        return ((latents.float() - shift) * scale).to(latents.dtype)

    def undo(self, latents: Tensor) -> Tensor:
        """Scaled (M, C, h, w) to those that the decoder takes."""
        scale, shift = self._tables()
        return (latents.float() / scale + shift).to(latents.dtype)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Sets both so that these latents have mean 0 and deviation 1 in each channel.

        Args:
            batches: unscaled latents, each (M, C, h, w).

        Raises:
            DataError: if there are none, or a channel is constant.
        """
        count = 0
        total, square = (torch.zeros_like(self.shift, dtype=torch.float64) for _ in range(2))
        for latents in batches:
            values = rearrange(latents, "M C h w -> C (M h w)").double()
            count += values.shape[1]
            total += values.sum(1)
            square += values.square().sum(1)
        if not count:
            raise DataError("no latents to measure a scale on; give at least one batch of media")
        mean = total / count
        variance = square / count - mean.square()
        if not (variance > 0).all():
            flat = (variance <= 0).nonzero().flatten().tolist()
            raise DataError(
                f"the latents of channels {flat} are the same everywhere, so they have no scale;"
                " train the autoencoder first, and measure on different media"
            )
        self.shift.copy_(mean)
        self.scale.copy_(variance.rsqrt())

    def _tables(self) -> tuple[Tensor, Tensor]:
        scale, shift = (rearrange(t.float(), "C -> C 1 1") for t in (self.scale, self.shift))
        return scale, shift

    def extra_repr(self) -> str:
        return str(len(self.scale))
