"""Images to a backbone's positions: `model.encode` against transformers' own pipeline.

Both sides take the same eight photographs-sized images from memory, share one tower (12 layers, 384
wide, random weights) and one projector, on one thread, fp32. Fixed size: 224 pixels, 196 patches.
Native aspect (NaFlex): at most 256 patches of 16 pixels; transformers pads to the limit.

    hatch run bench vision
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Siglip2ImageProcessorPil, SiglipImageProcessorPil

import xoron_core
from benchmarks.harness import (
    arguments,
    compare,
    machine_floors,
    one_thread,
    peak_resident_megabytes,
    say,
)
from xoron_core.components import Features
from xoron_core.model import XoronModel

THEIRS, OURS = "transformers", "xoron"
SHAPES = ((480, 640), (640, 480), (512, 512), (300, 900))


def tower(kind: str, *, smoke: bool) -> dict[str, Any]:
    """The data of a tower's config."""
    own = {"image_size": 224} if kind == "siglip_vision_model" else {"num_patches": 256}
    return {
        "model_type": kind,
        "patch_size": 16,
        "hidden_size": 32 if smoke else 384,
        "intermediate_size": 64 if smoke else 1536,
        "num_hidden_layers": 1 if smoke else 12,
        "num_attention_heads": 2 if smoke else 6,
        **own,
    }


def compose(kind: str, *, smoke: bool) -> XoronModel:
    """The tower and a perceiver of 64 positions."""
    encoder = {"use": "siglip", "vision_config": tower(kind, smoke=smoke)}
    projector = {"use": "perceiver", "num_heads": 2 if smoke else 6, "output_size": 1024}
    image = {"encoder": encoder, "projector": projector}
    return xoron_core.compose({"image": image}, plugins="vision")[0]


def pipeline(model: XoronModel, kind: str) -> Callable[[list[Image.Image]], Features]:
    """transformers' processor and the tower as its users call them, then the projector."""
    inner, projector = model.part("image.encoder").tower, model.part("image.projector")
    processor: Any = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)
    if kind == "siglip_vision_model":
        processor = SiglipImageProcessorPil()

    @torch.no_grad()
    def run(images: list[Image.Image]) -> Features:
        batch = processor(images, return_tensors="pt")
        seen = inner(**batch).last_hidden_state
        mask = batch.get("pixel_attention_mask", torch.ones(seen.shape[:2]))
        result: Features = projector(Features(seen, mask.bool()))
        return result

    return run


def main() -> int:
    """Runs both towers, checks that the sides agree, and prints the ratios."""
    options = arguments("Images per second of encode and project.", rounds=9)
    chosen = options.parse_args()
    rng = np.random.default_rng(0)
    shapes = SHAPES if chosen.smoke else SHAPES * 2
    images = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in shapes]
    found: dict[str, Any] = {}
    with one_thread():
        for kind in ("siglip_vision_model", "siglip2_vision_model"):
            model = compose(kind, smoke=chosen.smoke)
            theirs = pipeline(model, kind)
            off = (theirs(images).values - model.encode(images).values).abs().max().item()
            if off > 1e-3:
                raise AssertionError(f"{kind}: the sides differ by {off:.3g}")
            report = compare(
                {THEIRS: partial(theirs, images), OURS: partial(model.encode, images)},
                rounds=1 if chosen.smoke else chosen.rounds,
                floors=machine_floors(smoke=chosen.smoke),
            )
            rates = {side: len(images) / took.seconds for side, took in report.sides.items()}
            found[kind] = asdict(report) | {"images_per_second": rates}
            told = ", ".join(f"{side} {rate:.1f} images/s" for side, rate in rates.items())
            say(f"{kind}: {told}")
            if not chosen.json:
                print(report.table())
    found["peak_megabytes"] = peak_resident_megabytes()
    if chosen.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"peak memory {found['peak_megabytes']:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
