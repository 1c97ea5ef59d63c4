"""Configs of the encoders: which tower, how images are prepared for it. Imports no torch.

Footgun: how pixels are normalised belongs to a checkpoint. It is read from its
`preprocessor_config.json` when the composition is written, and travels in the composition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from xoron_core.config import Config, read_json
from xoron_core.errors import ConfigError
from xoron_vision.published import published_file

FIXED = "siglip_vision_model"
NATIVE = "siglip2_vision_model"
_TOWERS = {"siglip": FIXED, "siglip2": NATIVE, FIXED: FIXED, NATIVE: NATIVE}
# Pillow's numbers, as preprocessor_config.json holds them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Preprocess(Config):
    """How an image becomes numbers: resized with antialiasing, (x * scale - mean) / std.

    Attributes:
        mean, std: per channel, after scaling.
        scale: what 8-bit values are multiplied with.
        resample: the filter.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: float = 1 / 255
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic"] = "bicubic"


class SiglipConfig(Config):
    """A SigLIP or SigLIP 2 vision tower (Zhai et al. 2023, Tschannen et al. 2025).

    Attributes:
        path: a folder as `save_pretrained` writes it (the tower's own or the whole two-tower
            model's), or a name on the Hugging Face Hub; its weights are loaded when the model is
            composed. None with `vision_config` starts from random weights.
        vision_config: transformers' config of the tower as data. `model_type` decides:
            `siglip_vision_model` takes images of one fixed size, `siglip2_vision_model` (NaFlex)
            takes each image in its own aspect ratio. Read from `path` where it is not given.
        image_size: height and width in pixels, or one number for both, if other than the
            checkpoint's; its positions are then interpolated. Only for a fixed size.
        max_patches: the most patches of one image, if other than the checkpoint's. Only for NaFlex.
        preprocess: read from `path` where it is not given.
    """

    path: str | None = None
    vision_config: dict[str, Any] | None = None
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    max_patches: PositiveInt | None = None
    preprocess: Preprocess | None = None

    @model_validator(mode="after")
    def _is_a_tower(self) -> Self:
        if self.vision_config is None:
            if self.path is None:
                raise ValueError(
                    "siglip needs path (a checkpoint's folder or a Hub name), preset or"
                    " vision_config (the data of a transformers vision config)"
                )
            return self
        kind = self.vision_config.get("model_type")
        if kind not in (FIXED, NATIVE):
            raise ValueError(f"vision_config.model_type is {kind!r}, expected {FIXED} or {NATIVE}")
        if self.native and self.image_size is not None:
            raise ValueError("a NaFlex tower has no image_size; set max_patches")
        if not self.native and self.max_patches is not None:
            raise ValueError("a tower of fixed size has no max_patches; set image_size")
        return self

    def resolved(self) -> Self:
        """The same with `vision_config` and `preprocess` filled in from `path`.

        Raises:
            ConfigError: if there is no usable config.json there.
        """
        data = self.data()
        if self.vision_config is None:
            assert self.path is not None
            data["vision_config"] = read_vision_config(self.path)
        if self.preprocess is None:
            native = data["vision_config"]["model_type"] == NATIVE
            default = Preprocess(resample="bilinear" if native else "bicubic").data()
            data["preprocess"] = default | (read_preprocess(self.path) if self.path else {})
        return type(self).parse(data)

    @property
    def tower(self) -> dict[str, Any]:
        """`vision_config`, which a resolved config has."""
        if self.vision_config is None:
            raise ConfigError("siglip: the config is not resolved; build from config.resolved()")
        return self.vision_config

    @property
    def native(self) -> bool:
        """Whether each image keeps its aspect ratio."""
        return self.tower["model_type"] == NATIVE

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.tower.get("patch_size", 16))

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width that the checkpoint's positions are for."""
        return _pair(self.tower.get("image_size", 224))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that images are resized to."""
        return self.own_size if self.image_size is None else _pair(self.image_size)

    @property
    def patch_limit(self) -> int:
        """The most patches of one image of a NaFlex tower."""
        return self.max_patches or int(self.tower.get("num_patches", 256))


class ConvVitConfig(Config):
    """Convolutions that halve the image, then transformer layers on the rest (Xiao et al. 2021).

    Attributes:
        image_size: side in pixels of what every image is resized to, a multiple of `stride`.
        widths: channels behind each halving; the last is the width of the transformer.
        num_blocks: residual blocks of convolutions between the last halving and the transformer.
        num_layers, num_heads: of the transformer.
        norm_groups: of the convolutions' group norms, dividing every width.
        rope_theta: base of the 2-D rotary positions.
        preprocess: how pixels are normalised.
    """

    image_size: PositiveInt = 64
    widths: tuple[PositiveInt, ...] = (32, 64, 128)
    num_blocks: int = Field(default=0, ge=0)
    num_layers: int = Field(default=2, ge=0)
    num_heads: PositiveInt = 4
    norm_groups: PositiveInt = 8
    rope_theta: float = Field(default=100.0, gt=0)
    preprocess: Preprocess | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.widths:
            raise ValueError(
                "widths is empty, expected channels behind each halving, e.g. [32, 64]"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {self.stride}, as the image is"
                f" halved {len(self.widths)} times"
            )
        if odd := [width for width in self.widths if width % self.norm_groups]:
            raise ValueError(f"widths {odd} are no multiples of norm_groups {self.norm_groups}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"the last width {self.hidden_size} must be a multiple of 4 * num_heads"
                f" ({4 * self.num_heads}): each head rotates in two axes"
            )
        return self

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Side in pixels of the square behind a feature."""
        return int(2 ** len(self.widths))


class XoronVisionConfig(Config):
    """Tower, 1-D compression and dual-stream attention: the published Xoron vision encoder.

    Attributes:
        tower: what sees the patches.
        freeze_tower: whether the tower stays as it is while the rest is trained.
        num_latents: features of every image, K.
        hidden_size: width of the compression and of the features.
        num_layers: of the compression over patches and latents in one sequence.
        dual_stream_layers: of joint attention between patches and latents behind it.
        num_heads: of both.
        rope_theta: base of the 2-D rotary positions of patches.
    """

    tower: SiglipConfig
    freeze_tower: bool = False
    num_latents: PositiveInt = 256
    hidden_size: PositiveInt = 512
    num_layers: int = Field(default=8, ge=0)
    dual_stream_layers: int = Field(default=2, ge=0)
    num_heads: PositiveInt = 8
    rope_theta: float = Field(default=100.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 * num_heads"
                f" ({4 * self.num_heads}): each head rotates in two axes"
            )
        if self.num_layers + self.dual_stream_layers == 0:
            raise ValueError("num_layers and dual_stream_layers are both 0: latents see nothing")
        return self

    def resolved(self) -> Self:
        """The same with a resolved tower."""
        return type(self).parse(self.data() | {"tower": self.tower.resolved().data()})


def read_vision_config(path: str) -> dict[str, Any]:
    """The vision part of a checkpoint's config.json, with its `model_type`.

    Raises:
        ConfigError: if there is none, or not of a SigLIP tower.
    """
    data = _read(path, "config.json", required=True)
    kind = data.get("model_type")
    if kind not in _TOWERS:
        raise ConfigError(
            f"siglip: {path}: config.json is of model_type {kind!r}, expected one of"
            f" {', '.join(_TOWERS)}"
        )
    vision = data if kind in (FIXED, NATIVE) else data.get("vision_config", {})
    return {**vision, "model_type": _TOWERS[kind]}


def read_preprocess(path: str) -> dict[str, Any]:
    """What a checkpoint's preprocessor_config.json says of pixels; empty without that file.

    Raises:
        ConfigError: for a filter that is not known.
    """
    data = _read(path, "preprocessor_config.json", required=False)
    names = {"image_mean": "mean", "image_std": "std", "rescale_factor": "scale"}
    found = {ours: data[theirs] for theirs, ours in names.items() if theirs in data}
    if data.get("do_rescale") is False:
        found["scale"] = 1.0
    if data.get("do_normalize") is False:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if (number := data.get("resample")) is not None:
        if number not in _RESAMPLE:
            raise ConfigError(
                f"siglip: {path}: preprocessor_config.json has resample {number!r}, expected one of"
                f" {', '.join(f'{k} ({v})' for k, v in _RESAMPLE.items())}; set preprocess"
            )
        found["resample"] = _RESAMPLE[number]
    return found


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _read(path: str, name: str, *, required: bool) -> dict[str, Any]:
    folder = Path(path)
    if not folder.is_dir() and (known := published_file(path, name)) is not None:
        return known
    file = folder / name if folder.is_dir() else _download(path, name, required=required)
    if file is None or not (required or file.exists()):
        return {}
    expected = "path must be a folder that save_pretrained wrote, or a Hub name"
    return read_json(file, what="siglip", expected=expected)


def _download(name: str, file: str, *, required: bool) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # Of a file that is merely not cached, nothing is known while offline.
        if not required and isinstance(error, RemoteEntryNotFoundError):
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"siglip: {name!r} is no folder here and {file} cannot be fetched from the Hub"
            f" ({reason}); check the spelling, or download the model and give its folder as path"
        ) from None
