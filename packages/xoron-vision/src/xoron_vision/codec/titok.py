"""The codec `titok-fsq`: an image as a row of K ids that need not lie on a grid.

    pixels (M, 3, H, W) -> patches (M, L, D), in one sequence with K learned latents
      -> transformer, of whose result only the latents are kept -> d numbers each -> FSQ -> K ids
      -> codes, in one sequence with L mask tokens -> transformer, of which only these are kept
      -> pixels

(Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation"), with finite
scalar quantisation (Mentzer et al. 2023) where the paper has a codebook. Published TiTok weights do
not fit: theirs have class tokens and another quantiser.

Footguns:
- Positions are learned, so an image has one size.
- Pixels go from -1 to 1 inside and in `forward`, whose reconstruction is not clamped; `decode`
  gives images from 0 to 1.

Shapes: M images, H and W pixels, P pixels of a patch, L patches, K latents, D width, d numbers of a
code, C colours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from xoron_core.components import Context
from xoron_core.nn.joint_attention import JointBlock
from xoron_core.nn.quantize_fsq import FSQ, check_levels
from xoron_vision.codec.base import ImageCodec
from xoron_vision.codec.config import TitokConfig, VitConfig

# As large as what patches and codes say at the start: with less, nobody finds where they are.
PLACE_STD = 0.5


class Transformer(nn.Module):
    """Pre-norm blocks over one sequence, normalised before and behind.

    Args:
        sizes: of the blocks.
    """

    def __init__(self, sizes: VitConfig) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(sizes.hidden_size)
        self.layers = nn.ModuleList(
            JointBlock(sizes.hidden_size, sizes.num_heads, num_streams=1)
            for _ in range(sizes.num_layers)
        )
        self.norm_out = nn.LayerNorm(sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(M, N, D) to (M, N, D)."""
        x = self.norm_in(x)
        for layer in self.layers:
            (x,) = layer(x)
        return cast(Tensor, self.norm_out(x))


class Encoder(nn.Module):
    """Pixels to the numbers of K codes, not yet rounded."""

    def __init__(self, config: TitokConfig) -> None:
        super().__init__()
        D, P = config.encoder.hidden_size, config.patch_size
        L = config.grid[0] * config.grid[1]
        self.patches = nn.Conv2d(3, D, P, stride=P)
        self.positions = nn.Parameter(torch.randn(L, D) * PLACE_STD)
        self.latents = nn.Parameter(torch.randn(config.num_latents, D) * PLACE_STD)
        self.transformer = Transformer(config.encoder)
        self.to_codes = nn.Linear(D, len(config.levels))

    def forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) to (M, K, d)."""
        patches = rearrange(self.patches(pixels), "M D h w -> M (h w) D") + self.positions
        latents = repeat(self.latents, "K D -> M K D", M=len(pixels))
        x = self.transformer(torch.cat((patches, latents), dim=1))
        return cast(Tensor, self.to_codes(x[:, patches.shape[1] :]))


class Decoder(nn.Module):
    """K codes to pixels."""

    def __init__(self, config: TitokConfig) -> None:
        super().__init__()
        D, P = config.decoder.hidden_size, config.patch_size
        self.grid = config.grid
        self.patch_size = P
        self.from_codes = nn.Linear(len(config.levels), D)
        self.positions = nn.Parameter(torch.randn(config.num_latents, D) * PLACE_STD)
        # One for each patch: the mask token of the paper and its position in one.
        self.masks = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], D) * PLACE_STD)
        self.transformer = Transformer(config.decoder)
        self.to_patches = nn.Linear(D, 3 * P * P)
        # Across the edges of patches, which are written apart.
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(M, K, d) to (M, 3, H, W)."""
        codes = self.from_codes(codes) + self.positions
        masks = repeat(self.masks, "L D -> M L D", M=len(codes))
        x = self.transformer(torch.cat((masks, codes), dim=1))[:, : masks.shape[1]]
        h, P = self.grid[0], self.patch_size
        pattern = "M (h w) (C p q) -> M C (h p) (w q)"
        pixels = rearrange(self.to_patches(x), pattern, h=h, p=P, q=P)
        return cast(Tensor, self.smooth(pixels))


class TitokFsq(ImageCodec):
    """Images to K ids and back.

    Raises:
        ConfigError: for levels out of range.
    """

    config: TitokConfig
    name = "titok-fsq"

    def __init__(self, config: TitokConfig, context: Context) -> None:
        super().__init__(config, context)
        check_levels(config.levels)
        self.encoder = Encoder(config)
        self.quantizer = FSQ(config.levels)
        self.decoder = Decoder(config)
        self.apply(_initialise)
        nn.init.dirac_(self.decoder.smooth.weight)

    def to_ids(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) from -1 to 1 to (M, K) int64."""
        return cast(Tensor, self.quantizer(self.encoder(pixels)).indices)

    def to_pixels(self, ids: Tensor) -> Tensor:
        """(M, K) to (M, 3, H, W) from about -1 to 1."""
        codes = self.quantizer.indices_to_codes(ids)
        return cast(Tensor, self.decoder(codes.to(self.encoder.latents.dtype)))

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, *, original_size: Tensor | None = None
    ) -> dict[str, Any]:
        """The training path; the gradient passes straight through the rounding.

        Args:
            pixel_values: (M, 3, H, W) from -1 to 1.
            original_size: not read.

        Returns:
            `reconstruction` (M, 3, H, W) and `ids` (M, K); while it learns, `statistics`.
        """
        quantized = self.quantizer(self.encoder(self.checked(pixel_values)))
        output = {"reconstruction": self.decoder(quantized.codes), "ids": quantized.indices}
        return output | ({"statistics": self.usage(quantized.indices)} if self.learns() else {})


def _initialise(module: nn.Module) -> None:
    """Keeps the variance at every layer (as He et al. 2021, "Masked Autoencoders", do).

    torch's own start divides it by three, so that what latents first see of an image is lost beside
    what they are.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
