"""Small towers and parts shared by the tests of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xoron_core.components import Context, Features

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}


@pytest.fixture
def fixed():
    """The data of a tower for 32 by 32 pixels, 4 by 4 patches."""
    return {"model_type": "siglip_vision_model", "image_size": 32, **TINY}


@pytest.fixture
def native():
    """The data of a NaFlex tower trained with 4 by 4 patches."""
    return {"model_type": "siglip2_vision_model", "num_patches": 16, **TINY}


@pytest.fixture
def build():
    """Builds a part from config data, with weights that are not all alike."""

    def make(cls, config_cls, data, *, backbone_size=None, feature_size=None):
        config = config_cls.parse(data)
        config = config.resolved() if hasattr(config, "resolved") else config
        torch.manual_seed(0)
        slot = "image.encoder" if feature_size is None else "image.projector"
        part = cls(config, Context(slot, hidden_size=backbone_size, feature_size=feature_size))
        with torch.no_grad():
            for index, parameter in enumerate(part.parameters()):
                rng = torch.Generator().manual_seed(index)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
        return part.eval()

    return make


@pytest.fixture
def features():
    """Makes features of images with given grids, padded to the longest; padding is garbage."""

    def make(*grids, size=8):
        lengths = torch.tensor([h * w for h, w in grids])
        rng = torch.Generator().manual_seed(0)
        longest = int(lengths.max())
        values = torch.randn(len(grids), longest, size, generator=rng)
        positions = torch.full((len(grids), longest, 2), 77.0)
        for row, (h, w) in zip(positions, grids, strict=True):
            row[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        return Features(values, torch.arange(longest) < lengths[:, None], positions)

    return make
