"""Configs of the audio codecs. Imports no torch.

Footgun: the identity of a codec's ids, which guards sequences and checkpoints, is made of its sizes
and its preprocessing. Two trainings of one shape have the same identity and different ids; name the
weights that ids were made with in your data.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from xoron_core.config import Config


class AudioCodecConfig(Config):
    """What audio codecs have in common: frames of a fixed length, each of Q ids.

    Attributes:
        pattern: how a frame's ids stand in a sequence: `interleaved`, one after another, or
            `delay`, each codebook a step behind the one before (Copet et al. 2023, "MusicGen").
        max_seconds: the longest recording that is generated; what is read may be longer.
    """

    pattern: Literal["interleaved", "delay"] = "interleaved"
    max_seconds: PositiveFloat = 30.0

    @property
    def rate(self) -> int:
        """Samples per second."""
        raise NotImplementedError

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """C, of what it reads and makes."""
        raise NotImplementedError

    @property
    def codebooks(self) -> tuple[int, int]:
        """Q, and codes of each."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """What the ids mean, as far as sizes say it."""
        raise NotImplementedError

    @property
    def max_frames(self) -> int:
        """The most frames of what is generated."""
        return max(1, math.floor(self.max_seconds * self.rate / self.hop))

    def frames(self, num_samples: Any) -> Any:
        """T, how many frames so many samples at `rate` take; the last may not be full.

        Args:
            num_samples: an integer, or a tensor of them.
        """
        return -(-num_samples // self.hop)

    def delay(self, codebook: int) -> int:
        """By how many steps a codebook stands behind the first."""
        return codebook if self.pattern == "delay" else 0


class RvqAudioConfig(AudioCodecConfig):
    """Causal convolutions around a residual quantiser (Zeghidour et al. 2021, "SoundStream").

    Attributes:
        sampling_rate: samples per second.
        strides: of the levels, downwards; their product is the samples of a frame.
        widths: channels before the first level and behind each.
        kernel_size: of the residual convolutions, and of the first and the last one.
        dilations: of a level's residual convolutions, one unit each.
        activation: `snake`, which bends towards waves (Ziyin et al. 2020), or `elu`, which is
            faster.
        code_dim: D, numbers of a code.
        num_codebooks: Q.
        codebook_size: codes of each.
        dropout: share of the recordings that, while training, use only their first 1 .. Q of the
            codebooks.
        decay: of the codebooks' moving averages.
        commitment: weight of an output's distance from its code.
        restart_below: codes chosen less often than this share of an even use start again.
        loudness: root mean square to which each recording is scaled before it is encoded; the
            inverse scale goes into its metadata. What is generated has this loudness, since its
            scale is 1. None leaves recordings as they are, which streams need.
        mel_windows: samples of the windows in which spectra are compared.
        waveform_weight: of the mean difference of samples, relative to `loudness`.
        spectrum_weight: of the mean difference of log-mel spectra, in nats.
    """

    sampling_rate: PositiveInt = 24000
    strides: tuple[PositiveInt, ...] = Field(default=(2, 4, 5, 8), min_length=1)
    widths: tuple[PositiveInt, ...] = (64, 128, 256, 512, 1024)
    kernel_size: PositiveInt = 7
    dilations: tuple[PositiveInt, ...] = (1, 3, 9)
    activation: Literal["snake", "elu"] = "snake"
    code_dim: PositiveInt = 128
    num_codebooks: PositiveInt = 4
    codebook_size: PositiveInt = 1024
    dropout: float = Field(default=0.0, ge=0, le=1)
    decay: float = Field(default=0.99, ge=0, lt=1)
    commitment: float = Field(default=0.25, ge=0)
    restart_below: float = Field(default=0.03, ge=0, lt=1)
    loudness: PositiveFloat | None = 0.1
    mel_windows: tuple[PositiveInt, ...] = Field(default=(64, 128, 256, 512, 1024, 2048))
    waveform_weight: float = Field(default=0.1, ge=0)
    spectrum_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.widths) != len(self.strides) + 1:
            raise ValueError(
                f"{len(self.widths)} widths for {len(self.strides)} strides, expected one width"
                " before the first level and one behind each"
            )
        if wrong := [size for size in self.mel_windows if size < 16 or size % 4]:
            raise ValueError(f"mel_windows has {wrong[0]}, expected multiples of 4 from 16")
        return self

    @property
    def rate(self) -> int:
        """`sampling_rate`."""
        return self.sampling_rate

    @property
    def hop(self) -> int:
        """The product of the strides."""
        return math.prod(self.strides)

    @property
    def channels(self) -> int:
        """1: recordings are mixed down."""
        return 1

    @property
    def codebooks(self) -> tuple[int, int]:
        """`num_codebooks` and `codebook_size`."""
        return self.num_codebooks, self.codebook_size

    @property
    def identity(self) -> str:
        """Sizes and preprocessing."""
        strides, widths = (".".join(map(str, each)) for each in (self.strides, self.widths))
        units = f"k{self.kernel_size}/" + ".".join(map(str, self.dilations))
        level = "as-is" if self.loudness is None else f"{self.loudness:g}"
        codes = f"{self.num_codebooks}x{self.codebook_size}x{self.code_dim}"
        shape = f"{self.rate}/{strides}/{widths}/{units}/{self.activation}"
        return f"rvq-audio/{shape}/{level}/{codes}"
