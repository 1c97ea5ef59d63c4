"""Hears digits in recordings without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xoron_train.conversation import TRAIN
from xoron_train.tasks.token_media import Reader
from xoron_train.tasks.token_speech.dataset import TokenSpeech

_WINDOW, _HOP = 256, 80
_BANDS = 24
_FRAMES = 24
# Below this power all is silence.
_FLOOR = 1e-4


class SpeechReader(Reader):
    """A classifier of recordings at 8 kHz.

    Args:
        samples: recordings to learn from.
        seed: of those; not that of the model's.
    """

    def __init__(self, *, samples: int = 3000, seed: int = 1) -> None:
        super().__init__(TokenSpeech(TRAIN, seed=seed), samples=samples)

    def features(self, media: Sequence[Any]) -> np.ndarray:
        """Log power in 24 bands over 24 frames, whatever the length."""
        return np.stack([_spectrum(np.asarray(audio.samples)[0]) for audio in media])


def _spectrum(samples: np.ndarray) -> np.ndarray:
    """(24 * 24,): bands that widen upwards, the frames spread over the recording."""
    samples = samples / max(float(np.sqrt(np.square(samples).mean())), 1e-6)
    samples = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_WINDOW)))) / _WINDOW
    edges = np.unique(np.geomspace(3, _WINDOW // 2 + 1, _BANDS + 1).round().astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + _FLOOR)
    places = np.linspace(0, len(bands) - 1, _FRAMES)
    spread = [np.interp(places, np.arange(len(bands)), band) for band in bands.T]
    return np.concatenate(spread)
