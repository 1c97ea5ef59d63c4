"""What published checkpoints say of themselves, so that naming one can be planned without network.

Only what a preset names stands here, with what is the same but for its filter. Imports no torch.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from xoron_core.config import parse_yaml

# Pillow's number of the filter that images were resized with: bilinear and bicubic.
_RESAMPLE = {
    "google/siglip2-so400m-patch14-384": 2,
    "google/siglip-so400m-patch14-384": 3,
}


def published_file(name: str, file: str) -> dict[str, Any] | None:
    """The data of a checkpoint's config.json or preprocessor_config.json; None if not known.

    Args:
        name: on the Hugging Face Hub.
        file: of the checkpoint.
    """
    if name not in _RESAMPLE:
        return None
    if file == "preprocessor_config.json":
        half = [0.5, 0.5, 0.5]
        scale = {"rescale_factor": 1 / 255, "image_mean": half, "image_std": half}
        return {"resample": _RESAMPLE[name], **scale}
    place = "presets/siglip-so400m.yaml"
    text = resources.files("xoron_vision").joinpath(place).read_text(encoding="utf-8")
    sizes, _ = parse_yaml(text, place)
    return {"model_type": "siglip", **sizes}
