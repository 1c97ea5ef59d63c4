"""Reads digits from images without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xoron_train.conversation import TRAIN
from xoron_train.tasks.token_digits.dataset import TokenDigits
from xoron_train.tasks.token_media import Reader


class DigitReader(Reader):
    """A classifier of images (32, 32, 3), uint8 or from 0 to 255.

    Args:
        samples: images to learn from.
        seed: of those; not that of the model's.
    """

    def __init__(self, *, samples: int = 5000, seed: int = 1) -> None:
        super().__init__(TokenDigits(TRAIN, seed=seed), samples=samples)

    def features(self, media: Sequence[Any]) -> np.ndarray:
        """Brightness of 16 by 16 squares."""
        grey = np.stack(media).astype(np.float32).mean(-1) / 255
        n, side, _ = grey.shape
        squares = grey.reshape(n, side // 2, 2, side // 2, 2).mean((2, 4))
        return squares.reshape(n, -1)
