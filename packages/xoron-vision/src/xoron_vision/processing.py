"""Images to pixels, in data workers: picklable, weight-free, without torch until collation.

Pillow resizes (its filters are antialiased), numpy normalises, as the processors of transformers do
with Pillow.

Shapes: M images, H and W pixels, L patches of P by P pixels, h and w patches of one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from PIL import Image

from xoron_vision.config import Preprocess, SiglipConfig

if TYPE_CHECKING:
    from torch import Tensor

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def pixel_values(image: Image.Image, size: tuple[int, int], how: Preprocess) -> np.ndarray:
    """An RGB image to (H, W, 3) fp32, resized to (H, W) and normalised."""
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), _FILTERS[how.resample])
    mean, std = np.array(how.mean), np.array(how.std)
    values = np.asarray(image).astype(np.float32)
    values *= (how.scale / std).astype(np.float32)
    values -= (mean / std).astype(np.float32)
    return values


@dataclass(frozen=True)
class FixedSize:
    """Every image resized to one size.

    Attributes:
        size: (H, W).
        patch_size: P; what is left over at the right and the bottom is not seen.
        how: filter and normalisation.
        num_features: what the encoder makes of an image; None is one feature per patch.
    """

    size: tuple[int, int]
    patch_size: int
    how: Preprocess
    num_features: int | None = None

    def load(self, media: Image.Image) -> dict[str, Any]:
        """An RGB image to (3, H, W)."""
        values = pixel_values(media, self.size, self.how)
        return {"pixel_values": np.ascontiguousarray(rearrange(values, "H W C -> C H W"))}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items to `pixel_values` (M, 3, H, W)."""
        import torch

        return {"pixel_values": torch.from_numpy(np.stack([i["pixel_values"] for i in items]))}

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """The same for every image."""
        return self.num_features or math.prod(side // self.patch_size for side in self.size)


@dataclass(frozen=True)
class NativeAspect:
    """Every image in its own aspect ratio, scaled to at most so many patches (NaFlex).

    Attributes:
        max_patches: the limit of h times w.
        patch_size: P.
        how: filter and normalisation.
        num_features: what the encoder makes of an image; None is one feature per patch.
    """

    max_patches: int
    patch_size: int
    how: Preprocess
    num_features: int | None = None

    def load(self, media: Image.Image) -> dict[str, Any]:
        """An RGB image to (L, P * P * 3) patches, row by row, and their (h, w)."""
        P = self.patch_size
        h, w = native_grid(media.height, media.width, P, limit=self.max_patches)
        values = pixel_values(media, (h * P, w * P), self.how)
        patches = rearrange(values, "(h p) (w q) C -> (h w) (p q C)", p=P, q=P)
        return {"pixel_values": np.ascontiguousarray(patches), "spatial_shape": (h, w)}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items to patches, padded to the longest.

        Returns:
            `pixel_values` (M, L, P * P * 3), `pixel_attention_mask` (M, L), 1 valid, and
            `spatial_shapes` (M, 2) int64.
        """
        import torch

        counts = torch.tensor([len(item["pixel_values"]) for item in items])
        values = torch.zeros(len(items), int(counts.max()), items[0]["pixel_values"].shape[1])
        for row, item in zip(values, items, strict=True):
            row[: len(item["pixel_values"])] = torch.from_numpy(item["pixel_values"])
        mask = torch.arange(values.shape[1]) < counts[:, None]
        shapes = torch.tensor([item["spatial_shape"] for item in items])
        return {
            "pixel_values": values,
            "pixel_attention_mask": mask.long(),
            "spatial_shapes": shapes,
        }

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """h times w of this image."""
        return self.num_features or math.prod(item["spatial_shape"])


def native_grid(height: int, width: int, patch_size: int, *, limit: int) -> tuple[int, int]:
    """Patches down and across: the largest scale at which ceil(h) * ceil(w) stays within the limit.

    Found by bisection over the scale, with the bounds of transformers' NaFlex processor, so that
    both take the same grid for every image.
    """
    low, high, tolerance = 1e-6, 100.0, 1e-5

    def grid(scale: float) -> tuple[int, int]:
        h, w = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return h, w

    while high - low >= tolerance:
        middle = (low + high) / 2
        if math.prod(grid(middle)) <= limit:
            low = middle
        else:
            high = middle
    return grid(low)


def processor_of(config: SiglipConfig, num_features: int | None = None) -> FixedSize | NativeAspect:
    """The processor for a tower."""
    how = config.preprocess or Preprocess()
    if config.native:
        return NativeAspect(config.patch_limit, config.patch_size, how, num_features)
    return FixedSize(config.size, config.patch_size, how, num_features)
