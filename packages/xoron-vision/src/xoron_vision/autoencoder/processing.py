"""Images to the pixels of an autoencoder, in data workers: picklable and weight-free.

The one place where 8-bit colours become numbers from -1 to 1. The way back is `decode`, whose
images from 0 to 1 are what `xoron_vision.image.load_image` takes.

Shapes: M images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from xoron_core.errors import DataError
from xoron_vision.autoencoder.config import ImageSize
from xoron_vision.config import Preprocess
from xoron_vision.processing import pixel_values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WholeLatents:
    """Every image to a size that is whole latents.

    Attributes:
        size: (H, W) that every image is scaled to cover, its middle cut out; None keeps its own
            size, cut at the edges to multiples of `factor`.
        factor: pixels per latent, down and across.
        how: filter, and the map from 0 .. 255 to -1 .. 1.
    """

    size: tuple[int, int] | None
    factor: int
    how: Preprocess

    def load(self, media: Image.Image) -> dict[str, Any]:
        """An RGB image to (3, H, W) from -1 to 1.

        Raises:
            DataError: if it keeps its size and is smaller than one latent.
        """
        values = pixel_values(self._cut(media), self._size(media), self.how)
        return {"pixel_values": np.ascontiguousarray(rearrange(values, "H W C -> C H W"))}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items to `pixel_values` (M, 3, H, W).

        Raises:
            DataError: if they are of different sizes.
        """
        import torch

        sizes = list(dict.fromkeys(item["pixel_values"].shape[1:] for item in items))
        if len(sizes) > 1:
            (h, w), (other_h, other_w) = sizes[:2]
            raise DataError(
                f"a batch of images of {h} by {w} and {other_h} by {other_w} pixels, expected one"
                " size; set image_size, or put images of one size together"
            )
        return {"pixel_values": torch.from_numpy(np.stack([i["pixel_values"] for i in items]))}

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """Latents of an image."""
        H, W = item["pixel_values"].shape[1:]
        return int(H // self.factor * (W // self.factor))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        height, width = (side - side % self.factor for side in (image.height, image.width))
        if not (height and width):
            raise DataError(
                f"an image of {image.height} by {image.width} pixels, expected at least"
                f" {self.factor} by {self.factor}; scale it up, or set image_size"
            )
        return height, width

    def _cut(self, image: Image.Image) -> Image.Image:
        height, width = self._size(image)
        if self.size is not None:
            filter_ = Image.Resampling[self.how.resample.upper()]
            return ImageOps.fit(image, (width, height), filter_)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def processor_of(config: ImageSize) -> WholeLatents:
    """The processor for an autoencoder."""
    return WholeLatents(config.size, config.factor, Preprocess(resample=config.resample))
