"""`token-digits`: one scanned digit per image, to be read or drawn; judged on other hands."""

from __future__ import annotations

from typing import Any

import numpy as np

from xoron_train.conversation import TRAIN
from xoron_train.tasks.digits.scans import scans
from xoron_train.tasks.digits.scenes import digit_ink
from xoron_train.tasks.token_media import TokenMedia

IMAGE_SIZE = 32
_SIDES = (26, 30)
_GROUND = (0, 30)
_INK = (200, 255)


class TokenDigits(TokenMedia):
    """One split; its images are (32, 32, 3) uint8. Those of `train` are warped at random."""

    name = "token-digits"
    content_type = "image"
    question = "Which digit is it?"

    def __init__(self, split: str, **options: Any) -> None:
        super().__init__(split, **options)
        self.scans = scans(trained=split == TRAIN)

    @staticmethod
    def prompt(digit: int) -> str:
        """What asks for a digit to be drawn."""
        return f"Draw a {digit}."

    def medium(self, rng: np.random.Generator, digit: int) -> np.ndarray:
        """A bright digit on a dark ground, nearly as large as the image."""
        scan = self.scans.images[rng.choice(self.scans.by_digit[digit])]
        side = int(rng.integers(_SIDES[0], _SIDES[1] + 1))
        y, x = rng.integers(0, IMAGE_SIZE - side + 1, 2)
        ground, ink = rng.uniform(*_GROUND), rng.uniform(*_INK)
        image = np.full((IMAGE_SIZE, IMAGE_SIZE), ground)
        shown = digit_ink(scan, side, rng if self.split == TRAIN else None)
        image[y : y + side, x : x + side] += shown * (ink - ground)
        grey = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
