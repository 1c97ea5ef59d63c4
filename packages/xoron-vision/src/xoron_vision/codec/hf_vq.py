"""The codec `hf-vq`: image tokenizers of transformers as they are, for use and not for training.

    Emu3VQVAE       emu3_vqgan         8 pixels per id   Wang et al. 2024, "Emu3"
    JanusVQVAE      janus_vqgan        16                Chen et al. 2025, "Janus-Pro"
    ChameleonVQVAE  chameleon_vqgan    16                Chameleon Team 2024; ids only

From a folder: the tokenizer's own, or that of the whole published model, of which only the
tokenizer is read. Ids are transformers' own.

Footguns:
- transformers has no decoder of Chameleon's: with it, images can be read and not made.
- The ids that these models' own vocabularies give to images are others; these are the codebook's.
- The preprocessing is the checkpoint's: Emu3 and Janus may norm with CLIP's mean and deviation.

Shapes: M images, H and W pixels, h = H / factor and w = W / factor, T = h * w ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from einops import rearrange
from torch import Tensor

from xoron_core.components import Context
from xoron_core.errors import ConfigError, DataError, FolderError
from xoron_core.storage import read_tensors
from xoron_vision.codec.base import ImageCodec
from xoron_vision.codec.hf_config import VQ_CLASSES, HfVqConfig

# Where the published models keep their tokenizer.
_PREFIX = "vqmodel."


class HfVq(ImageCodec):
    """Images to ids and back, by an image tokenizer of transformers.

    Raises:
        ConfigError: if transformers does not take its config.
    """

    config: HfVqConfig
    name = "hf-vq"

    def __init__(self, config: HfVqConfig, context: Context) -> None:
        super().__init__(config, context)
        self.network: Any = build_network(config).requires_grad_(False)

    def to_ids(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) to (M, T) int64, row by row."""
        M, T = len(pixels), self.config.num_tokens
        if not M:
            return torch.zeros(0, T, dtype=torch.int64, device=pixels.device)
        if self.config.model_type == "emu3_vqgan":
            sizes = torch.tensor([self.config.pixels] * M)
            return torch.stack(self.network.encode(pixels, sizes).image_tokens).view(M, T)
        return cast(Tensor, self.network.encode(pixels).image_tokens).view(M, T)

    def to_pixels(self, ids: Tensor) -> Tensor:
        """(M, T) to (M, 3, H, W).

        Raises:
            DataError: for Chameleon's.
        """
        if self.config.model_type == "chameleon_vqgan":
            raise DataError(
                "hf-vq: transformers has no decoder of Chameleon's image tokenizer, so its ids"
                " make no images; use emu3 or janus, or route images in only"
            )
        if not len(ids):
            return torch.zeros(0, 3, *self.config.pixels, device=ids.device)
        if self.config.model_type == "emu3_vqgan":
            ids = rearrange(ids, "M (h w) -> M h w", h=self.config.grid[0])
        return cast(Tensor, self.network.decode(ids))

    @classmethod
    def find_source(cls, config: HfVqConfig) -> None:
        """Looks for the weights of `path`.

        Raises:
            FolderError: if there are none.
        """
        if config.path is not None:
            weight_files(config.path)

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the weights of `path`; without a path they stay random.

        Raises:
            FolderError: if some are missing or of another shape.
        """
        if self.config.path is not None:
            load_network(self.network, self.config.path)


def build_network(config: HfVqConfig) -> Any:
    """An image tokenizer of transformers with random weights, or none on the meta device.

    Raises:
        ConfigError: if it does not take the config.
    """
    name = VQ_CLASSES[config.model_type]
    data = {k: v for k, v in config.known.items() if k not in ("model_type", "architectures")}
    data.pop("transformers_version", None)
    try:
        return getattr(transformers, name)(getattr(transformers, f"{name}Config")(**data))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"hf-vq: network makes no {name}: {error}") from None


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        FolderError: if there are none.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FolderError(
            f"hf-vq: {path}: no *.safetensors files; give the folder of an image tokenizer, or of a"
            " whole model, with config.json and weights"
        )
    return files


def load_network(network: Any, path: str) -> None:
    """Copies the tokenizer's weights out of a folder.

    Raises:
        FolderError: if some are missing or of another shape.
    """
    wanted, found = network.state_dict(), {}
    for file in weight_files(path):
        for name, tensor in read_tensors(file).items():
            if (ours := name.rpartition(_PREFIX)[2]) in wanted:
                found[ours] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if wrong := [n for n, tensor in wanted.items() if shapes.get(n) != tuple(tensor.shape)]:
        name = wrong[0]
        raise FolderError(
            f"hf-vq: {path}: {len(wrong)} weights do not fit its config.json, e.g. {name!r}:"
            f" expected {tuple(wanted[name].shape)}, got {shapes.get(name, 'none')}; copy the"
            " folder again, whole"
        )
    network.load_state_dict(found)
