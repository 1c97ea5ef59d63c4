"""Proves that the image codecs learn: scanned digits that they never saw come back better than the
mean of those they saw. Prints how evenly codes are used.
"""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import xoron_core
from xoron_core.nn.quantize import usage_entropy

SLOT = "image.codec"
# Steps and images of a batch, and by how many dB the mean image is to be beaten.
PLANS = {"vq-image": (80, 8, 8.0), "titok-fsq": (480, 16, 2.0)}


def scans(rows):
    """(n, 32, 32, 3) uint8: each pixel of a scan four by four times."""
    pixels = (load_digits().images[rows] * 255 / 16).astype(np.uint8)
    return list(pixels.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, -1))


def psnr(images, originals):
    """In dB, for (M, 3, H, W) from 0 to 1."""
    return float(-10 * torch.log10((images - originals).square().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("use", PLANS)
def test_scans_never_seen_are_reconstructed(use):
    steps, size, margin = PLANS[use]
    torch.manual_seed(0)
    composition = {"name": "x", "image": {"codec": {"use": use, "preset": "tiny"}}}
    model, processor = xoron_core.compose(composition)
    codec = model.part(SLOT)
    seen, unseen = (
        processor.media_batch(SLOT, scans(rows)) for rows in (slice(1400), slice(1400, 1500))
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    rng = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(seen["pixel_values"]), (size,), generator=rng)
        output = model(media={SLOT: {name: tensor[rows] for name, tensor in seen.items()}})
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.after_optimizer_step({SLOT: output.outputs[SLOT]["statistics"]})
    model.eval()
    codes = model.call(SLOT, "encode", **unseen)
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    originals, known = ((each["pixel_values"] + 1) / 2 for each in (unseen, seen))
    mean = known.mean(0, keepdim=True).expand_as(originals)
    found, control = (psnr(each, originals) for each in (decoded, mean))
    entropy = usage_entropy(codes.ids.flatten().bincount(minlength=codec.config.num_codes))
    print(
        f"{use}: PSNR {found:.2f} dB, mean image {control:.2f}; {len(codes.ids.unique())} of"
        f" {codec.config.num_codes} codes used, entropy {float(entropy):.2f}"
    )
    assert found > control + margin
