"""Audio to the samples of a codec, in data workers: picklable and weight-free.

Shapes: M items, C channels, N samples of an item, L samples of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xoron_audio.audio import Audio, converted
from xoron_audio.codec.config import AudioCodecConfig

if TYPE_CHECKING:
    from torch import Tensor

# What is quieter than this below the loudness asked for (80 dB) is not made louder any more.
QUIETEST = 1e-4


@dataclass(frozen=True)
class Waveforms:
    """Recordings at a codec's rate, with its channels, and perhaps its loudness.

    Attributes:
        config: of the codec.
        whole_frames: whether a batch is filled up with zeros to whole frames.
        loudness: root mean square that every recording gets, or None.
    """

    config: AudioCodecConfig
    whole_frames: bool = True
    loudness: float | None = None

    def load(self, media: Audio) -> dict[str, Any]:
        """Audio to (C, N) fp32, and the scale that takes it back to its loudness."""
        samples = converted(media, self.config.rate, self.config.channels)
        scale = 1.0
        if self.loudness is not None:
            level = float(np.sqrt(np.square(samples, dtype=np.float64).mean()))
            scale = max(level / self.loudness, QUIETEST)
        return {"samples": samples / np.float32(scale), "scale": np.float32(scale)}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items to `samples` (M, C, L), zeros behind, `num_samples` (M,) int64 and `scale` (M,)."""
        import torch

        counts = [item["samples"].shape[-1] for item in items]
        longest = max(counts)
        if self.whole_frames:
            longest = self.config.frames(longest) * self.config.hop
        samples = torch.zeros(len(items), self.config.channels, longest)
        for row, item, count in zip(samples, items, counts, strict=True):
            row[:, :count] = torch.from_numpy(item["samples"])
        scales = torch.tensor([float(item["scale"]) for item in items])
        return {"samples": samples, "num_samples": torch.tensor(counts), "scale": scales}

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """T, the frames of an item."""
        return self.config.frames(item["samples"].shape[-1])
