"""The config of `hf-vq`, and what it reads of a checkpoint's folder. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from xoron_core.config import read_json
from xoron_core.errors import ConfigError
from xoron_vision.codec.config import ImageCodecConfig
from xoron_vision.config import Preprocess

# By model_type, the classes of transformers that `hf-vq` takes.
VQ_CLASSES = {
    "emu3_vqgan": "Emu3VQVAE",
    "janus_vqgan": "JanusVQVAE",
    "chameleon_vqgan": "ChameleonVQVAE",
}


class HfVqConfig(ImageCodecConfig):
    """An image tokenizer of transformers, as it is; for use, not for training.

    Attributes:
        path: a folder with config.json and safetensors, of the tokenizer alone or of the whole
            model; read when the model is composed. None with `network` starts from random weights.
        network: transformers' config of the tokenizer as data; `model_type` is emu3_vqgan,
            janus_vqgan or chameleon_vqgan. Read from `path` where it is not given.
        image_size: as for all codecs; Janus takes one size only, which its config implies.
        preprocess: read from `path` where it is not given; else colours go from -1 to 1.
    """

    path: str | None = None
    network: dict[str, Any] | None = None
    preprocess: Preprocess | None = None

    @model_validator(mode="after")
    def _is_a_tokenizer(self) -> Self:
        if self.network is None:
            if self.path is None:
                raise ValueError("hf-vq needs path, the folder of an image tokenizer")
            return self
        if (found := self.network.get("model_type")) not in VQ_CLASSES:
            raise ValueError(
                f"network.model_type is {found!r}, expected one of {', '.join(VQ_CLASSES)}"
            )
        if found == "janus_vqgan":
            side = self.network.get("num_patches", 32) * self.factor
            if self.pixels != (side, side):
                raise ValueError(
                    f"image_size is {self.image_size}, but this Janus tokenizer makes images of"
                    f" {side} by {side} pixels; set image_size: {side}"
                )
        return self

    def resolved(self) -> Self:
        """The same with `network` and `preprocess` filled in from `path`.

        Raises:
            ConfigError: if there is no usable config.json.
        """
        if self.path is None:
            return self
        data = self.data()
        if self.network is None:
            data["network"] = read_vq_config(self.path)
        if self.preprocess is None:
            found = read_preprocess(self.path) | {"resample": self.resample}
            data["preprocess"] = Preprocess.parse(found).data()
        return type(self).parse(data)

    @property
    def known(self) -> dict[str, Any]:
        """`network`, once it is read.

        Raises:
            ConfigError: if it is not.
        """
        if self.network is None:
            raise ConfigError("hf-vq: the config is not resolved; use config.resolved()")
        return self.network

    @property
    def model_type(self) -> str:
        """Of transformers."""
        return str(self.known["model_type"])

    @property
    def factor(self) -> int:
        """Pixels per id, down and across; 1 while it is not known."""
        if self.network is None:
            return 1
        default = 4 if self.network.get("model_type") == "emu3_vqgan" else 5
        levels = self.network.get("channel_multiplier") or [1] * default
        return int(2 ** (len(levels) - 1))

    @property
    def num_codes(self) -> int:
        """Codes of the codebook."""
        key, default = {
            "emu3_vqgan": ("codebook_size", 32768),
            "janus_vqgan": ("num_embeddings", 16384),
            "chameleon_vqgan": ("num_embeddings", 8192),
        }[self.model_type]
        return int(self.known.get(key, default))

    @property
    def num_tokens(self) -> int:
        """Places of the grid."""
        return math.prod(self.grid)

    @property
    def how(self) -> Preprocess:
        """As `preprocess` says."""
        return self.preprocess or super().how

    @property
    def identity(self) -> str:
        """The kind of tokenizer, its size and preprocessing."""
        how = self.how
        norm = ".".join(f"{value:g}" for value in (*how.mean, *how.std, how.scale))
        return f"hf-vq/{self._shown}/{self.model_type}/{self.num_codes}/{norm}"


def read_vq_config(path: str) -> dict[str, Any]:
    """The tokenizer's part of a folder's config.json.

    Raises:
        ConfigError: if there is none.
    """
    data = _read(path, "config.json")
    found = data.get("vq_config", data)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"hf-vq: {path}: config.json holds no vq_config")
    kind = found.get("model_type") or f"{data.get('model_type')}_vqgan"
    if kind not in VQ_CLASSES:
        raise ConfigError(
            f"hf-vq: {path}: config.json is of {kind!r}, expected one of {', '.join(VQ_CLASSES)}"
        )
    return found | {"model_type": kind}


def read_preprocess(path: str) -> dict[str, Any]:
    """Mean, deviation and scale of a folder's preprocessor_config.json; none without the file."""
    if not (Path(path) / "preprocessor_config.json").exists():
        return {}
    data = _read(path, "preprocessor_config.json")
    names = {"image_mean": "mean", "image_std": "std", "rescale_factor": "scale"}
    return {ours: data[theirs] for theirs, ours in names.items() if data.get(theirs) is not None}


def _read(path: str, name: str) -> dict[str, Any]:
    expected = "path must be the folder of a transformers image tokenizer or of a model with one"
    return read_json(Path(path) / name, what="hf-vq", expected=expected)
