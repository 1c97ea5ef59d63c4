"""What image codecs have in common: ranges, metadata, refusals, pixel losses, use of codes.

A codec of this package says how pixels become ids and ids pixels; all else is here.

Footguns:
- `decode` gives images of the codec's own size. The metadata of an image that had another one hold
  its `original_size` (height, width); its edges were cut off where its shape was another.
- Statistics come from `forward` in training mode, and only while the codec learns: a frozen one has
  a frozen codebook.

Shapes: M images, H and W pixels, T ids of an image, C codes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from xoron_core.components import Codec, Codes, LossTerm
from xoron_core.errors import DataError
from xoron_core.nn.quantize import usage_entropy
from xoron_core.tokens.space import CodecRange
from xoron_vision.autoencoder.kl_image import PIXEL_ERRORS
from xoron_vision.codec.config import ImageCodecConfig
from xoron_vision.codec.processing import FixedTokens, processor_of


class ImageCodec(Codec):
    """Images of one size to T ids each, and back."""

    config: Any
    name: ClassVar[str]

    @classmethod
    def processor(cls, config: ImageCodecConfig) -> FixedTokens:
        """Images scaled and cut to the codec's size."""
        return processor_of(config)

    @classmethod
    def ranges(cls, config: ImageCodecConfig) -> list[CodecRange]:
        """One codebook; its rate is the ids of an image."""
        name, rate = f"xoron-vision/{cls.name}", float(config.num_tokens)
        return [CodecRange(name, 0, config.num_codes, config.identity, rate, "image")]

    @classmethod
    def frame_limits(cls, config: ImageCodecConfig) -> tuple[int, int]:
        """An image is T ids, neither fewer nor more."""
        return config.num_tokens, config.num_tokens

    @abstractmethod
    def to_ids(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) as the processor makes them to (M, T) int64."""

    @abstractmethod
    def to_pixels(self, ids: Tensor) -> Tensor:
        """(M, T) to pixels (M, 3, H, W), as the processor makes them but not clamped."""

    @torch.no_grad()
    def encode(  # type: ignore[override]  # the tensors that its processor collates
        self, pixel_values: Tensor, *, original_size: Tensor | None = None
    ) -> Codes:
        """Pixels to ids.

        Args:
            pixel_values: (M, 3, H, W) as the processor makes them.
            original_size: (M, 2) int64 heights and widths before they were scaled, or None.

        Returns:
            Ids (M, T, 1); metadata hold `original_size` where it was another.

        Raises:
            DataError: for pixels of another size.
        """
        ids = self.to_ids(self.checked(pixel_values))
        return Codes(
            ids[..., None],
            torch.ones_like(ids, dtype=torch.bool),
            self._metadata(original_size, len(ids)),
        )

    @torch.no_grad()
    def decode(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Ids (M, T, 1) to images (M, 3, H, W) from 0 to 1; metadata change nothing.

        Raises:
            DataError: for ids of another number or out of range.
        """
        self._check_ids(ids)
        how = self.config.how
        mean, std = (
            rearrange(torch.tensor(each, device=ids.device), "C -> C 1 1")
            for each in (how.mean, how.std)
        )
        pixels = self.to_pixels(ids[..., 0])
        return ((pixels * std + mean) / (how.scale * 255)).clamp(0, 1).to(pixels.dtype)

    def checked(self, pixels: Tensor) -> Tensor:
        """The pixels in the dtype of the weights.

        Raises:
            DataError: for pixels of another size.
        """
        expected = (3, *self.config.pixels)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise DataError(
                f"{self.name}: pixels of shape {tuple(pixels.shape)}, expected (images,"
                f" {', '.join(map(str, expected))}); its processor prepares them"
            )
        return pixels.to(next(self.parameters()).dtype)

    def learns(self) -> bool:
        """Whether it is trained now, so that its codebook may move."""
        return self.training and any(p.requires_grad for p in self.parameters())

    def aux_losses(
        self, output: Mapping[str, Tensor], media: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """The pixel error, per colour value."""
        error = PIXEL_ERRORS[self.config.pixel_loss]
        pixels, target = output["reconstruction"].float(), media["pixel_values"].float()
        count = self.aux_counts(media)["pixel"]
        return {"pixel": LossTerm(error(pixels, target, reduction="sum"), count)}

    def aux_counts(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Colour values, M * 3 * H * W."""
        pixels = media["pixel_values"]
        return {"pixel": torch.tensor(float(pixels.numel()), device=pixels.device)}

    def usage(self, ids: Tensor) -> dict[str, Tensor]:
        """How often each code is among the ids: `counts` (C,), for `metrics`."""
        return {"counts": torch.bincount(ids.flatten(), minlength=self.config.num_codes).float()}

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """How evenly codes were used in a step, from 0 to 1; small batches cannot reach 1."""
        counts = stats["counts"]
        return {"code_entropy": float(usage_entropy(counts))} if counts.any() else {}

    def dummy_batch(self) -> dict[str, Tensor]:
        """One grey image."""
        H, W = self.config.pixels
        size = torch.tensor([[H, W]])
        return {"pixel_values": torch.zeros(1, 3, H, W), "original_size": size}

    def _metadata(self, sizes: Tensor | None, count: int) -> list[dict[str, Any]]:
        if sizes is None:
            return [{} for _ in range(count)]
        own = list(self.config.pixels)
        return [{} if size == own else {"original_size": size} for size in sizes.tolist()]

    def _check_ids(self, ids: Tensor) -> None:
        T, C = self.config.num_tokens, self.config.num_codes
        if ids.ndim != 3 or tuple(ids.shape[1:]) != (T, 1):
            raise DataError(
                f"{self.name}: ids of shape {tuple(ids.shape)}, expected (images, {T}, 1): an image"
                f" is {T} ids"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < C:
            raise DataError(
                f"{self.name}: ids from {int(ids.min())} to {int(ids.max())}, expected 0 to"
                f" {C - 1}; give ids of this codebook, not those of the token space"
            )
