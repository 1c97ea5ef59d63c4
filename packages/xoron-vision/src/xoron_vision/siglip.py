"""The encoder `siglip`: transformers' SigLIP vision towers, fixed size or NaFlex.

Footguns:
- The pooling head of a checkpoint is left out: features are those of the patches, and what nobody
  reads gets no gradient (so400m has 428.2 M parameters with its head, 413.0 M without).
- A fixed-size tower resizes every image to one size, whatever its aspect ratio.
- Padding of a NaFlex batch is hidden from attention; its rows in the result hold no meaning.

Shapes: M images, H and W pixels, L patches (padded to the longest), h and w patches of one image,
S side of the position grid that a tower was trained with, E width.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from xoron_core.components import Context, Encoder, Features
from xoron_core.errors import ConfigError, FolderError
from xoron_core.hub import need_weights
from xoron_vision.config import SiglipConfig
from xoron_vision.processing import FixedSize, NativeAspect, processor_of


class SiglipEncoder(Encoder):
    """A SigLIP vision tower; features are the patches behind its last norm.

    Raises:
        ConfigError: if the config is not resolved, or is none of a tower.
    """

    config: SiglipConfig

    def __init__(self, config: SiglipConfig, context: Context) -> None:
        super().__init__(config, context)
        self.tower = build_tower(config)
        self.feature_size = int(self.tower.config.hidden_size)

    @classmethod
    def processor(cls, config: SiglipConfig) -> FixedSize | NativeAspect:
        """Resizes and normalises as the checkpoint was trained."""
        return processor_of(config)

    def forward(  # type: ignore[override]  # the tensors that its processor collates
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> Features:
        """Pixels to features.

        Args:
            pixel_values: (M, 3, H, W); for NaFlex (M, L, 3 P P), patches.
            pixel_attention_mask: for NaFlex (M, L), 1 valid.
            spatial_shapes: for NaFlex (M, 2) int64, h and w.

        Returns:
            Values (M, L, E); positions (M, L, 2) are row and column of each patch.
        """
        if not len(pixel_values):
            return self._nothing()
        if spatial_shapes is None or pixel_attention_mask is None:
            return self._fixed(pixel_values)
        output = self.tower(
            pixel_values=pixel_values,
            # The tower reads values of a mask to leave it out; there are none on the meta device.
            pixel_attention_mask=None if pixel_values.is_meta else pixel_attention_mask,
            spatial_shapes=spatial_shapes,
        )
        values = cast(Tensor, output.last_hidden_state)
        positions = grid_positions(spatial_shapes, values.shape[1])
        return Features(values, pixel_attention_mask.bool(), positions)

    def _fixed(self, pixel_values: Tensor) -> Features:
        h, w = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        output = self.tower(
            # With channels last the convolution's patches are rows in memory. Else every layer adds
            # to columns: measured 1.09 times slower in training `tiny`, 1.04 times with so400m.
            pixel_values=pixel_values.contiguous(memory_format=torch.channels_last),
            interpolate_pos_encoding=self.config.size != self.config.own_size,
        )
        values = cast(Tensor, output.last_hidden_state)
        grid = grid_positions(torch.tensor([[h, w]], device=values.device), h * w)
        mask = values.new_ones(values.shape[:2], dtype=torch.bool)
        return Features(values, mask, grid.expand(len(values), -1, -1))

    def _nothing(self) -> Features:
        """No image: transformers' towers cannot reshape what is empty."""
        dummy = {name: t.to(self.tower.device) for name, t in self.dummy_batch().items()}
        return Features(*(t[:0] for t in self(**dummy) if t is not None))

    def dummy_batch(self) -> dict[str, Tensor]:
        """One image of the tower's size; for NaFlex one of 2 by 2 patches."""
        if not self.config.native:
            return {"pixel_values": torch.zeros(1, 3, *self.config.size)}
        return {
            "pixel_values": torch.zeros(1, 4, 3 * self.config.patch_size**2),
            "pixel_attention_mask": torch.ones(1, 4, dtype=torch.int64),
            "spatial_shapes": torch.full((1, 2), 2),
        }

    @classmethod
    def find_source(cls, config: SiglipConfig) -> None:
        """Asks the Hub for the weights of `path`, if it is a name.

        Raises:
            FolderError: if they cannot be fetched.
        """
        if config.path is not None:
            need_weights(config.path, "siglip")

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the weights of `path`; without a path they stay random.

        Raises:
            FolderError: if there are none, or they are incomplete.
        """
        if self.config.path is not None:
            load_tower(self.tower, self.config.path)

    def reset_buffers(self) -> None:
        """Rebuilds the indices of positions, which a load leaves uninitialised."""
        for name, buffer in self.tower.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device))


def build_tower(config: SiglipConfig) -> PreTrainedModel:
    """A tower with random weights, or none on the meta device, without its pooling head.

    Raises:
        ConfigError: if transformers does not take the config.
    """
    data = {key: value for key, value in config.tower.items() if key != "model_type"}
    data.pop("transformers_version", None)
    data["vision_use_head"] = False
    try:
        if not config.native:
            return SiglipVisionModel(SiglipVisionConfig(**data))
        tower = Siglip2VisionModel(Siglip2VisionConfig(**data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"siglip: vision_config makes no tower: {error}") from None
    # Theirs loops over images and reads their sizes, which the meta device has not.
    tower.embeddings.resize_positional_embeddings = resize_positions
    return tower


def load_tower(tower: PreTrainedModel, path: str) -> None:
    """Copies a checkpoint's weights into a tower.

    Raises:
        FolderError: if they cannot be read, or some are missing or of another shape.
    """
    try:
        source, info = type(tower).from_pretrained(
            path,
            config=tower.config,
            dtype=next(tower.parameters()).dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FolderError(
            f"siglip: the weights of {path!r} cannot be loaded ({reason}); give a folder with"
            " config.json and safetensors files, or a Hub name while online"
        ) from None
    if wrong := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise FolderError(
            f"siglip: {path!r} lacks {len(wrong)} weights of {type(tower).__name__}, or has them in"
            f" another shape, e.g. {wrong[0]}; copy the folder again, whole"
        )
    tower.load_state_dict(source.state_dict())


def grid_positions(shapes: Tensor, length: int) -> Tensor:
    """(M, 2) grids to (M, L, 2) fp32 rows and columns; beyond h * w they mean nothing."""
    index = torch.arange(length, device=shapes.device)
    width = shapes[:, 1:]
    return torch.stack((index // width, index % width), dim=-1).float()


def resize_positions(table: Tensor, shapes: Tensor, max_length: int) -> Tensor:
    """Bilinear, antialiased interpolation of a position table to every image's own grid.

    Equal to `F.interpolate(mode="bilinear", antialias=True)` image by image, as two small matrices
    per image instead of a loop.

    Args:
        table: (S, S, E).
        shapes: (M, 2) int64, h and w.
        max_length: L.

    Returns:
        (M, L, E), zero beyond h * w.
    """
    place = grid_positions(shapes, max_length)
    rows = _triangle_weights(place[..., 0], shapes[:, :1], table.shape[0])
    columns = _triangle_weights(place[..., 1], shapes[:, 1:], table.shape[1])
    mixed = torch.einsum("mls,mlt,ste->mle", rows, columns, table.float())
    valid = torch.arange(max_length, device=shapes.device) < shapes.prod(-1, keepdim=True)
    return torch.where(valid[..., None], mixed, 0).to(table.dtype)


def _triangle_weights(place: Tensor, sides: Tensor, source: int) -> Tensor:
    """Weights of S source positions for places (M, L) on a side of (M, 1) positions: (M, L, S)."""
    scale = source / sides.float()
    center = scale * (place + 0.5)
    reach = scale.clamp(min=1)  # shrinking averages over a wider triangle
    index = torch.arange(source, device=place.device) + 0.5
    distance = (index - rearrange(center, "m l -> m l 1")) / rearrange(reach, "m 1 -> m 1 1")
    weights = (1 - distance.abs()).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
