"""Proves that a recipe teaches `vq-image`: scanned digits that it never saw come back better than
the mean image by 8 dB, as in packages/xoron-vision/tests/test_codec_learns.py, whose plan this is.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import xoron_core

pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from PIL import Image  # comes with xoron-vision

from xoron_train import train
from xoron_train.recipe import Recipe

SLOT = "image.codec"
PLAN = {
    "batch_size": 8,
    "max_steps": 80,
    "learning_rate": 0.002,
    "betas": [0.9, 0.98],
    "warmup_ratio": 0.05,
    "min_lr_ratio": 0.0,
    "weight_decay": 0.0,
    "tensorboard": False,
}


def psnr(images, originals):
    """In dB, for (M, 3, H, W) from 0 to 1."""
    return float(-10 * torch.log10((images - originals).square().mean()))


@pytest.mark.slow
def test_a_recipe_teaches_vq_image_scans_that_it_never_saw(tmp_path):
    digits = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
    scans = (digits.images * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    lines = []
    for number, scan in enumerate(scans[:1400]):
        Image.fromarray(scan).save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(lines))
    codec = {"use": "vq-image", "preset": "tiny"}
    xoron_core.save(
        *xoron_core.compose({"name": "x", "image": {"codec": codec}}), tmp_path / "base"
    )
    mixture = {"scans": {"kind": "conversations", "path": str(tmp_path / "talks.jsonl")}}
    recipe = Recipe.parse({"name": "codec", "mixture": mixture, **PLAN})
    train(recipe, tmp_path / "run", model=tmp_path / "base", quiet=True)
    model, processor = xoron_core.load(tmp_path / "run/model")
    unseen, seen = (
        processor.media_batch(SLOT, [Image.fromarray(scan) for scan in scans[rows]])
        for rows in (slice(1400, 1500), slice(1400))
    )
    codes = model.eval().call(SLOT, "encode", **unseen)
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    originals, known = ((each["pixel_values"] + 1) / 2 for each in (unseen, seen))
    mean = known.mean(0, keepdim=True).expand_as(originals)
    found, control = psnr(decoded, originals), psnr(mean, originals)
    print(f"vq-image: PSNR {found:.2f} dB, mean image {control:.2f}")
    assert found > control + 8
