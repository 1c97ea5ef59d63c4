"""Configs of the image codecs. Imports no torch.

Footgun: the identity of a codec's ids, which guards sequences and checkpoints, is made of its sizes
and its preprocessing. Two trainings of one shape have the same identity and different ids; name the
weights that ids were made with in your data.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from xoron_core.config import Config
from xoron_vision.autoencoder.config import ImageSize, KlImageConfig
from xoron_vision.config import Preprocess


class ImageCodecConfig(ImageSize):
    """What image codecs have in common: one size of images, so that every image takes as many ids.

    Attributes:
        image_size: height and width in pixels, or one number for both; every image is scaled until
            it covers them, and its middle is cut out.
        resample: the filter.
    """

    @property
    def num_codes(self) -> int:
        """C, how many different ids there are."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """T, how many ids an image takes."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """What the ids mean, as far as sizes say it."""
        raise NotImplementedError

    @property
    def how(self) -> Preprocess:
        """Filter, and the map from 8-bit colours to what the network takes."""
        return Preprocess(resample=self.resample)

    @property
    def pixels(self) -> tuple[int, int]:
        """`image_size` as height and width."""
        assert self.size is not None
        return self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in patches."""
        H, W = self.pixels
        return H // self.factor, W // self.factor

    @property
    def _shown(self) -> str:
        return f"{self.pixels[0]}x{self.pixels[1]}/{self.resample}"

    @model_validator(mode="after")
    def _has_a_size(self) -> Self:
        if self.size is None:
            raise ValueError("image_size is none, expected a size: ids of an image are as many")
        self._check_size()
        return self


class VitConfig(Config):
    """One transformer.

    Attributes:
        hidden_size: D.
        num_layers: blocks.
        num_heads: dividing D.
    """

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        return self


class TitokConfig(ImageCodecConfig):
    """TiTok (Yu et al. 2024) with finite scalar quantisation.

    Attributes:
        patch_size: pixels of a patch, down and across.
        num_latents: K, ids of an image.
        levels: of each number of a code, from 3 to 256; their product is the number of codes.
        encoder, decoder: the transformers.
        pixel_loss: `l1`, `l2` or `huber` (with delta 1).
    """

    patch_size: PositiveInt = 16
    num_latents: PositiveInt = 256
    levels: tuple[PositiveInt, ...] = Field(default=(8, 8, 8, 16), min_length=1)
    encoder: VitConfig = VitConfig(hidden_size=512, num_layers=8, num_heads=8)
    decoder: VitConfig = VitConfig(hidden_size=1024, num_layers=24, num_heads=16)
    pixel_loss: Literal["l1", "l2", "huber"] = "l1"

    @property
    def factor(self) -> int:
        """Pixels of a patch."""
        return self.patch_size

    @property
    def num_codes(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.num_latents

    @property
    def identity(self) -> str:
        """Sizes, levels and preprocessing."""
        levels = ".".join(map(str, self.levels))
        sides = "-".join(f"{v.hidden_size}x{v.num_layers}" for v in (self.encoder, self.decoder))
        return f"titok-fsq/{self._shown}/p{self.patch_size}/k{self.num_latents}/{levels}/{sides}"


class VqImageConfig(ImageCodecConfig):
    """Convolutions around a grid of ids (van den Oord et al. 2017; Esser et al. 2021).

    Attributes:
        channels: of each level; each but the last halves height and width, so five make 16x.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_groups: groups of every group norm, dividing all channels.
        mid_attention: whether the lowest level has attention.
        codebook_size: C.
        code_dim: D, numbers of a code.
        decay: of the codebook's moving averages.
        commitment: weight of an output's distance from its code, against one colour value's error.
        restart_below: codes chosen less often than this share of an even use start again.
        pixel_loss: `l1`, `l2` or `huber` (with delta 1).
    """

    channels: tuple[PositiveInt, ...] = Field(default=(128, 128, 256, 256, 512), min_length=2)
    layers_per_block: PositiveInt = 2
    norm_groups: PositiveInt = 32
    mid_attention: bool = True
    codebook_size: PositiveInt = 16384
    code_dim: PositiveInt = 256
    decay: float = Field(default=0.99, ge=0, lt=1)
    commitment: float = Field(default=0.25, ge=0)
    restart_below: float = Field(default=0.03, ge=0, lt=1)
    pixel_loss: Literal["l1", "l2", "huber"] = "l1"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.network()
        return self

    def network(self) -> KlImageConfig:
        """The sizes of encoder and decoder, as the KL autoencoder's networks take them."""
        return KlImageConfig(
            channels=self.channels,
            layers_per_block=self.layers_per_block,
            norm_groups=self.norm_groups,
            mid_attention=self.mid_attention,
            image_size=None,
        )

    @property
    def factor(self) -> int:
        """Pixels per id, down and across."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def num_codes(self) -> int:
        """C."""
        return self.codebook_size

    @property
    def num_tokens(self) -> int:
        """Places of the grid."""
        return math.prod(self.grid)

    @property
    def identity(self) -> str:
        """Sizes and preprocessing."""
        widths = ".".join(map(str, self.channels))
        layers = f"{self.layers_per_block}{'a' if self.mid_attention else ''}"
        return f"vq-image/{self._shown}/{widths}/{layers}/{self.codebook_size}x{self.code_dim}"
