"""The codec `vq-image`: an image as a grid of ids, row by row, by convolutions.

    pixels (M, 3, H, W) -> encoder: levels of residual blocks, each but the last halving H and W
      -> (M, D, h, w) -> at each place the nearest of C codes -> h * w ids
      -> decoder, the same levels upwards -> pixels

(van den Oord et al. 2017, "Neural Discrete Representation Learning"; Esser et al. 2021, "Taming
Transformers for High-Resolution Image Synthesis", whose perceptual loss and discriminator are slots
of their own here, `perceptual` and `patch-gan`.)

Footguns:
- The codebook learns from `statistics`, by `after_optimizer_step`; without it a new codec learns to
  live with random codes.
- Pixels go from -1 to 1 inside and in `forward`, whose reconstruction is not clamped; `decode`
  gives images from 0 to 1.

Shapes: M images, H and W pixels, h = H / factor and w = W / factor, D numbers of a code, C codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from xoron_core.components import Context, LossTerm
from xoron_core.nn.quantize import Quantized, VectorQuantizer
from xoron_vision.autoencoder.kl_image import Network, initialise
from xoron_vision.codec.base import ImageCodec
from xoron_vision.codec.config import VqImageConfig


class VqImage(ImageCodec):
    """Images to a grid of ids and back."""

    config: VqImageConfig
    name = "vq-image"
    keep_fp32 = ("quantizer",)

    def __init__(self, config: VqImageConfig, context: Context) -> None:
        super().__init__(config, context)
        sizes, D = config.network(), config.code_dim
        self.encoder = Network(sizes, upwards=False, in_channels=3, out_channels=D)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            D,
            decay=config.decay,
            commitment=config.commitment,
            restart_below=config.restart_below,
        )
        self.decoder = Network(sizes, upwards=True, in_channels=D, out_channels=3)
        self.apply(initialise)

    def to_ids(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) from -1 to 1 to (M, h * w) int64, row by row."""
        places = rearrange(self.encoder(pixels), "M D h w -> M (h w) D")
        return self.quantizer.nearest(places.float())

    def to_pixels(self, ids: Tensor) -> Tensor:
        """(M, h * w) to (M, 3, H, W) from about -1 to 1."""
        codes = self.quantizer.lookup(ids).to(next(self.parameters()).dtype)
        return self._reconstruct(codes)

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, *, original_size: Tensor | None = None
    ) -> dict[str, Any]:
        """The training path; the gradient passes straight through the quantiser.

        Args:
            pixel_values: (M, 3, H, W) from -1 to 1.
            original_size: not read.

        Returns:
            `reconstruction` (M, 3, H, W), `ids` (M, h * w) and `commitment` (M, h * w); while it
            learns, `statistics` for `after_optimizer_step`.
        """
        hidden = self.encoder(self.checked(pixel_values))
        found: Quantized = self.quantizer(rearrange(hidden, "M D h w -> M (h w) D"))
        output: dict[str, Any] = {
            "reconstruction": self._reconstruct(found.values),
            "ids": found.indices,
            "commitment": found.commitment,
        }
        return output | ({"statistics": dict(found.statistics)} if self.learns() else {})

    def aux_losses(
        self, output: Mapping[str, Tensor], media: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """The pixel error, per colour value, and the commitment, per id."""
        distance = LossTerm(output["commitment"].sum(), self.aux_counts(media)["commitment"])
        return super().aux_losses(output, media) | {"commitment": distance}

    def aux_counts(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Colour values, and ids."""
        pixels = media["pixel_values"]
        ids = torch.tensor(float(len(pixels) * self.config.num_tokens), device=pixels.device)
        return super().aux_counts(media) | {"commitment": ids}

    def after_optimizer_step(self, stats: Mapping[str, Tensor]) -> None:
        """Moves the codebook by the statistics of a step."""
        self.quantizer.update(stats)

    def _reconstruct(self, codes: Tensor) -> Tensor:
        places = rearrange(codes, "M (h w) D -> M D h w", h=self.config.grid[0])
        return cast(Tensor, self.decoder(places))
