"""What audio codecs have in common: ranges, lengths, metadata, refusals.

A codec of this package says how samples become ids and ids samples; all else is here.

Footguns:
- A recording of N samples is ceil(N / hop) frames; the metadata hold `num_samples`, and decoding
  cuts there. What is generated has no metadata and is whole frames long.
- `decode` gives `Audio` at the codec's own rate, with samples clipped to -1 .. 1.

Shapes: M items, C channels, L samples, T frames, Q codebooks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from xoron_audio.audio import Audio
from xoron_audio.codec.config import AudioCodecConfig
from xoron_core.components import Codec
from xoron_core.errors import DataError
from xoron_core.tokens.space import CodecRange

NUM_SAMPLES = "num_samples"


class AudioCodec(Codec):
    """Recordings to T frames of Q ids each, and back."""

    config: Any
    name: ClassVar[str]

    @classmethod
    def ranges(cls, config: AudioCodecConfig) -> list[CodecRange]:
        """One range for each codebook; the rate is frames per second."""
        Q, C = config.codebooks
        rate = None if cls.needs_metadata(config) else config.rate / config.hop
        return [
            CodecRange(
                f"xoron-audio/{cls.name}", q, C, config.identity, rate, "audio", config.delay(q)
            )
            for q in range(Q)
        ]

    @classmethod
    def frame_limits(cls, config: AudioCodecConfig) -> tuple[int, int]:
        """From one frame to `max_seconds`."""
        return 1, config.max_frames

    @abstractmethod
    def to_samples(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Ids (M, T, Q) to samples (M, C, L) of the original loudness, at least T * hop of them."""

    @torch.no_grad()
    def decode(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]] = ()) -> list[Audio]:
        """Ids to recordings.

        Args:
            ids: (M, T, Q), local to each codebook; behind the end of an item anything legal.
            metadata: of each item, empty for what was generated; nothing at all is empty for all.

        Returns:
            M recordings at the codec's rate.

        Raises:
            DataError: for ids of another number or out of range, or metadata that do not fit.
        """
        self._check_ids(ids)
        metadata = metadata or [{}] * len(ids)
        if len(metadata) != len(ids):
            raise DataError(f"{self.name}: {len(metadata)} metadata for {len(ids)} items")
        lengths = [self._length(entry, ids.shape[1]) for entry in metadata]
        if not len(ids):
            return []
        samples = self.to_samples(ids, metadata).float().clamp(-1, 1).cpu().numpy()
        rows = zip(samples, lengths, strict=True)
        return [Audio(row[:, :length].copy(), self.config.rate) for row, length in rows]

    def checked(self, samples: Tensor) -> Tensor:
        """The samples in the dtype of the weights.

        Raises:
            DataError: for samples of another shape.
        """
        channels = self.config.channels
        if samples.ndim != 3 or samples.shape[1] != channels:
            raise DataError(
                f"{self.name}: samples of shape {tuple(samples.shape)}, expected (items,"
                f" {channels}, samples); its processor prepares them"
            )
        return samples.to(next(self.parameters()).dtype)

    def frame_mask(self, samples: Tensor, num_samples: Tensor) -> Tensor:
        """(M, T) bool, which frames of a batch an item has; an item has at least one."""
        places = torch.arange(self.config.frames(samples.shape[-1]), device=samples.device)
        return places < self.config.frames(num_samples)[:, None]

    def _length(self, metadata: Mapping[str, Any], frames: int) -> int:
        """How many samples an item of (up to) so many frames has."""
        most = frames * self.config.hop
        length = metadata.get(NUM_SAMPLES, most)
        if not isinstance(length, int) or not 0 < length <= most:
            raise DataError(
                f"{self.name}: {NUM_SAMPLES} is {length!r}, but {frames} frames are up to {most};"
                " the metadata belong to other ids"
            )
        return length

    def _check_ids(self, ids: Tensor) -> None:
        Q, C = self.config.codebooks
        if ids.ndim != 3 or ids.shape[-1] != Q or not ids.shape[1]:
            raise DataError(
                f"{self.name}: ids of shape {tuple(ids.shape)}, expected (items, frames, {Q}) with"
                " at least one frame"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < C:
            raise DataError(
                f"{self.name}: ids from {int(ids.min())} to {int(ids.max())}, expected 0 to"
                f" {C - 1}; give ids of each codebook, not those of the token space"
            )
