"""Configs of the image autoencoders and of the losses beside them. Imports no torch.

Footgun: latents of published weights have their own scale and shift, read from the checkpoint with
its sizes; those of a new autoencoder get theirs from `measure_scale`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from xoron_core.config import Config, read_json
from xoron_core.errors import ConfigError

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]
DIFFUSERS_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
# Our names and diffusers', where they are one thing.
_SAME = {
    "channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_groups": "norm_num_groups",
    "mid_attention": "mid_block_add_attention",
    "quant_conv": "use_quant_conv",
    "post_quant_conv": "use_post_quant_conv",
}
# What diffusers takes where its config.json does not say.
_THEIR_DEFAULTS = {
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


class ImageSize(Config):
    """How images are brought to a size that the autoencoder takes.

    Attributes:
        image_size: height and width in pixels, or one number for both: every image is scaled until
            it covers them, and its middle is cut out. None keeps an image's own size, cut at its
            edges to whole latents; a batch then needs images of one size.
        resample: the filter.
    """

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = 256
    resample: Resample = "bicubic"

    @property
    def factor(self) -> int:
        """Pixels per latent, down and across."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int] | None:
        """`image_size` as height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    def _check_size(self) -> None:
        if self.size is not None and any(side % self.factor for side in self.size):
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {self.factor}, which is what"
                " one latent covers"
            )


class KlImageConfig(ImageSize):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022).

    Attributes:
        path: a folder of a diffusers `AutoencoderKL`; sizes, weights, scale and shift are read from
            it when the model is composed. diffusers itself is not needed.
        channels: of each level; each but the last halves height and width, so four make 8x.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        latent_channels: C, 4 or 16 in published autoencoders.
        norm_groups: groups of every group norm, dividing all channels.
        mid_attention: whether the lowest level has attention.
        quant_conv, post_quant_conv: 1 by 1 convolutions behind the encoder and before the decoder;
            the 4-channel family has them, the 16-channel one does not.
        latent_scale, latent_shift: (latents - shift) * scale is what `encode` gives; one number or
            one for each channel. `measure_scale` replaces them.
        pixel_loss: `l1`, `l2` or `huber` (with delta 1).
        kl_weight: what a nat of the posterior costs, against one colour value's error.
    """

    path: str | None = None
    channels: tuple[PositiveInt, ...] = Field(default=(128, 256, 512, 512), min_length=2)
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_groups: PositiveInt = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    latent_scale: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0
    pixel_loss: Literal["l1", "l2", "huber"] = "l1"
    kl_weight: float = Field(default=1e-6, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if wrong := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(
                f"channels {wrong} are no multiples of norm_groups {self.norm_groups}; change one"
            )
        for name in ("latent_scale", "latent_shift"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(value)} numbers for {self.latent_channels} latent_channels;"
                    " give one, or one for each channel"
                )
        self._check_size()
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent, down and across: 8 with four levels."""
        return int(2 ** (len(self.channels) - 1))

    def resolved(self) -> Self:
        """The same with sizes, scale and shift filled in from `path`.

        Raises:
            ConfigError: if there is no usable config.json, or the written keys contradict it.
        """
        if self.path is None:
            return self
        found = kl_fields(self.path, read_folder(self.path, ("AutoencoderKL",)))
        data = self.data()
        for name, value in found.items():
            if name in self.model_fields_set and data[name] != value:
                raise ConfigError(
                    f"kl-image: {name} is {data[name]} here and {value} in {self.path}; remove the"
                    " key, the checkpoint decides"
                )
        return type(self).parse(data | found)


class DiffusersImageConfig(ImageSize):
    """An image autoencoder of diffusers, as it is; for use, not for training.

    Attributes:
        path: its folder (config.json and safetensors), read when the model is composed. None with
            `network` starts from random weights.
        network: its config.json as data; `_class_name` is AutoencoderKL, AutoencoderTiny or
            AutoencoderDC. Read from `path` where it is not given.
    """

    path: str | None = None
    network: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_an_autoencoder(self) -> Self:
        if self.network is None:
            if self.path is None:
                raise ValueError(
                    "diffusers-image needs path, the folder of a diffusers autoencoder"
                )
            return self
        if (name := self.network.get("_class_name")) not in DIFFUSERS_CLASSES:
            raise ValueError(
                f"network._class_name is {name!r}, expected one of {', '.join(DIFFUSERS_CLASSES)}"
            )
        self._check_size()
        return self

    def resolved(self) -> Self:
        """The same with `network` filled in from `path`.

        Raises:
            ConfigError: if there is no usable config.json.
        """
        if self.network is not None or self.path is None:
            return self
        network = read_folder(self.path, DIFFUSERS_CLASSES)
        return type(self).parse(self.data() | {"network": network})

    @property
    def factor(self) -> int:
        """Pixels per latent, down and across."""
        network = self.network or {}
        blocks = network.get("encoder_block_out_channels") or network.get("block_out_channels")
        if blocks is None:
            raise ConfigError(
                "diffusers-image: network names neither block_out_channels nor"
                " encoder_block_out_channels; give the whole config.json of the autoencoder"
            )
        return int(2 ** (len(blocks) - 1))


class PerceptualConfig(Config):
    """Distance between SigLIP features of images and their reconstructions.

    Attributes:
        of: the slot whose reconstructions are judged.
        path: a SigLIP checkpoint, as `encoder/siglip` takes it; read when the first loss is
            computed, and never saved.
        encoder: a slot of this composition with a `siglip` encoder, instead of `path`.
        layers: of the tower, 0 being its patch embedding; None takes four, evenly spaced.
        weight: of this loss.
    """

    of: str = "image.autoencoder"
    path: str | None = None
    encoder: str | None = None
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _has_one_judge(self) -> Self:
        if (self.path is None) == (self.encoder is None):
            raise ValueError(
                "perceptual needs either path (a SigLIP checkpoint) or encoder (a slot, such as"
                " image.encoder)"
            )
        return self


class PatchGanConfig(Config):
    """A discriminator of patches (Isola et al. 2017) with the hinge loss (Esser et al. 2021).

    Attributes:
        of: the slot whose reconstructions are judged.
        channels: of its first convolution, doubled at each of `num_layers`, up to eight times.
        num_layers: that halve height and width; 3 judge patches of 70 by 70 pixels.
        norm_groups: groups of its group norms, dividing `2 * channels`.
        weight: of the generator's term against the pixel loss. The discriminator's own term has
            weight 1: it shares no parameter with anything else.
    """

    of: str = "image.autoencoder"
    channels: PositiveInt = 64
    num_layers: PositiveInt = 3
    norm_groups: PositiveInt = 32
    weight: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (2 * self.channels) % self.norm_groups:
            raise ValueError(
                f"2 * channels ({2 * self.channels}) is no multiple of norm_groups"
                f" {self.norm_groups}; change one"
            )
        return self


def read_folder(path: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of a diffusers autoencoder, as it stands.

    Raises:
        ConfigError: if there is none, or of another class.
    """
    file = Path(path) / "config.json"
    expected = (
        "path must be the folder of a diffusers autoencoder, in a pipeline its sub-folder `vae`;"
        " `hf download NAME --local-dir DIR` fetches one"
    )
    data = read_json(file, what="autoencoder", expected=expected)
    if (name := data.get("_class_name")) not in classes:
        raise ConfigError(f"{file}: is of class {name!r}, expected {' or '.join(classes)}")
    return data


def kl_fields(path: str, data: dict[str, Any]) -> dict[str, Any]:
    """What an AutoencoderKL's config.json says, in our names.

    Raises:
        ConfigError: if it is of another shape than the published family.
    """
    levels = len(data.get("block_out_channels", [64]))
    expected = {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for key, value in expected.items():
        if data.get(key, value) != value:
            raise ConfigError(
                f"kl-image: {path}: config.json has {key} {data[key]}, expected {value}; use"
                " diffusers-image for this one"
            )
    found = {ours: data.get(theirs, _THEIR_DEFAULTS[theirs]) for ours, theirs in _SAME.items()}
    return found | latent_scale_of(data)


def latent_scale_of(data: dict[str, Any]) -> dict[str, Any]:
    """`latent_scale` and `latent_shift` as a diffusers config states them.

    Means and deviations per channel, where it has them, come before the scalar factor.
    """
    factor = data.get("scaling_factor")
    factor = 0.18215 if factor is None else float(factor)
    shift = data.get("shift_factor") or 0.0
    if (deviations := data.get("latents_std")) is None:
        return {"latent_scale": factor, "latent_shift": shift}
    means = data.get("latents_mean") or [0.0] * len(deviations)
    return {"latent_scale": [factor / each for each in deviations], "latent_shift": means}
