"""The config of `hf-audio`, and what it reads of a checkpoint's folder. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

from pydantic import PositiveInt, model_validator

from xoron_audio.codec.config import AudioCodecConfig
from xoron_core.config import read_json
from xoron_core.errors import ConfigError

# By model_type, the classes of transformers that `hf-audio` takes, and the values that their
# configs have where config.json is silent.
CODEC_CLASSES = {"encodec": "EncodecModel", "dac": "DacModel", "mimi": "MimiModel"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "encodec": {
        "sampling_rate": 24000,
        "audio_channels": 1,
        "codebook_size": 1024,
        "upsampling_ratios": [8, 5, 4, 2],
        "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
        "normalize": False,
        "chunk_length_s": None,
        "overlap": None,
    },
    "dac": {
        "sampling_rate": 16000,
        "audio_channels": 1,
        "codebook_size": 1024,
        "n_codebooks": 9,
        "downsampling_ratios": [2, 4, 8, 8],
    },
    "mimi": {
        "sampling_rate": 24000,
        "audio_channels": 1,
        "codebook_size": 2048,
        "num_quantizers": 32,
        "upsampling_ratios": [8, 6, 5, 4],
    },
}


class HfAudioConfig(AudioCodecConfig):
    """An audio codec of transformers, as it is; for use, not for training.

    Attributes:
        path: a folder with config.json and safetensors, read when the model is composed. None with
            `network` starts from random weights.
        network: transformers' config of the codec as data; `model_type` is encodec, dac or mimi.
            Read from `path` where it is not given.
        num_codebooks: Q, how many codebooks are used, the first ones; None is all. EnCodec takes
            those numbers only that one of its bandwidths has.
    """

    path: str | None = None
    network: dict[str, Any] | None = None
    num_codebooks: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_a_codec(self) -> Self:
        if self.network is None:
            if self.path is None:
                raise ValueError("hf-audio needs path, the folder of an audio codec")
            return self
        if (found := self.network.get("model_type")) not in CODEC_CLASSES:
            raise ValueError(
                f"network.model_type is {found!r}, expected one of {', '.join(CODEC_CLASSES)}"
            )
        possible = self.possible_codebooks
        if self.num_codebooks is not None and self.num_codebooks not in possible:
            offered = ", ".join(map(str, possible))
            raise ValueError(
                f"num_codebooks is {self.num_codebooks}, but this {found} can use {offered}"
            )
        if self.get("chunk_length_s", None) is not None and self.get("overlap", None) is None:
            raise ValueError("network has chunk_length_s but no overlap; EnCodec needs both")
        return self

    def resolved(self) -> Self:
        """The same with `network` filled in from `path`.

        Raises:
            ConfigError: if there is no usable config.json.
        """
        if self.path is None or self.network is not None:
            return self
        return type(self).parse(self.data() | {"network": read_codec_config(self.path)})

    def get(self, key: str, *default: Any) -> Any:
        """A value of the codec's config, or what transformers has in its place."""
        if self.network is None:
            raise ConfigError("hf-audio: the config is not resolved; use config.resolved()")
        value = self.network.get(key)
        if value is None:
            found = _DEFAULTS[self.model_type]
            return found.get(key, *default) if default else found[key]
        return value

    @property
    def model_type(self) -> str:
        """Of transformers."""
        assert self.network is not None
        return str(self.network["model_type"])

    @property
    def rate(self) -> int:
        """The codec's sampling rate."""
        return int(self.get("sampling_rate"))

    @property
    def channels(self) -> int:
        """Of what it reads and makes."""
        return int(self.get("audio_channels"))

    @property
    def hop(self) -> int:
        """Samples of a frame; Mimi halves its frames once more."""
        if self.model_type == "dac":
            return math.prod(self.get("downsampling_ratios"))
        product = math.prod(self.get("upsampling_ratios"))
        return 2 * product if self.model_type == "mimi" else product

    @property
    def chunk(self) -> tuple[int, int] | None:
        """Samples of EnCodec's chunks and between their beginnings, or None if it has none."""
        seconds = self.get("chunk_length_s", None)
        if seconds is None:
            return None
        length = int(seconds * self.rate)
        return length, max(1, int((1.0 - self.get("overlap")) * length))

    @property
    def chunk_frames(self) -> int | None:
        """Frames of a chunk, or None if it has none."""
        return None if self.chunk is None else -(-self.chunk[0] // self.hop)

    @property
    def normalized(self) -> bool:
        """Whether every chunk is scaled to one loudness, with its scale in the metadata."""
        return bool(self.get("normalize", False))

    @property
    def bandwidths(self) -> dict[int, float]:
        """EnCodec's bandwidths in kbit/s by the number of codebooks that they use."""
        frame_rate = math.ceil(self.rate / self.hop)
        bits = math.log2(self.get("codebook_size")) * frame_rate
        return {max(1, int(b * 1000 // bits)): b for b in self.get("target_bandwidths")}

    @property
    def possible_codebooks(self) -> tuple[int, ...]:
        """The numbers of codebooks that it can use."""
        if self.model_type == "encodec":
            return tuple(sorted(self.bandwidths))
        if self.model_type == "dac":
            return tuple(range(1, self.get("n_codebooks") + 1))
        # Mimi's semantic codebooks come first and are never left out.
        semantic = (self.network or {}).get("num_semantic_quantizers", 1)
        return tuple(range(semantic, self.get("num_quantizers") + 1))

    @property
    def codebooks(self) -> tuple[int, int]:
        """Q, and codes of each."""
        return self.num_codebooks or self.possible_codebooks[-1], int(self.get("codebook_size"))

    @property
    def identity(self) -> str:
        """The kind of codec and its sizes."""
        Q, C = self.codebooks
        chunk = "x".join(map(str, self.chunk or ())) or "whole"
        level = "normalized" if self.normalized else "as-is"
        sizes = f"{self.rate}/{self.channels}/{self.hop}/{chunk}/{level}"
        return f"hf-audio/{self.model_type}/{sizes}/{Q}x{C}"

    def frames(self, num_samples: Any) -> Any:
        """T; in chunks, every chunk has as many, however full it is."""
        if self.chunk is None or self.chunk_frames is None:
            return super().frames(num_samples)
        return -(-num_samples // self.chunk[1]) * self.chunk_frames


def read_codec_config(path: str) -> dict[str, Any]:
    """The config.json of a codec's folder.

    Raises:
        ConfigError: if there is none, or it is of something else.
    """
    file = Path(path) / "config.json"
    expected = "path must be the folder of an audio codec of transformers"
    data = read_json(file, what="hf-audio", expected=expected)
    if (found := data.get("model_type")) not in CODEC_CLASSES:
        raise ConfigError(f"{file}: is of {found!r}, expected one of {', '.join(CODEC_CLASSES)}")
    return data
