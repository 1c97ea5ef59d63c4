"""Images to the pixels of a codec, in data workers: picklable and weight-free.

Shapes: M images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xoron_vision.autoencoder.processing import WholeLatents
from xoron_vision.codec.config import ImageCodecConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FixedTokens(WholeLatents):
    """Every image to one size, and to one number of ids.

    Attributes:
        num_tokens: T, ids of an image.
    """

    num_tokens: int = 1

    def load(self, media: Image.Image) -> dict[str, Any]:
        """An RGB image to (3, H, W), with its own height and width beside it."""
        size = np.array([media.height, media.width])
        return super().load(media) | {"original_size": size}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items to `pixel_values` (M, 3, H, W) and `original_size` (M, 2) int64."""
        import torch

        sizes = torch.from_numpy(np.stack([item["original_size"] for item in items]))
        return super().collate(items) | {"original_size": sizes}

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """The same for every image."""
        return self.num_tokens


def processor_of(config: ImageCodecConfig) -> FixedTokens:
    """The processor for a codec."""
    return FixedTokens(config.pixels, config.factor, config.how, num_tokens=config.num_tokens)
