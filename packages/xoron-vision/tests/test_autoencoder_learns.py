"""Proves that `kl-image` learns: scanned digits that it never saw come back better than their mean
colour by 6 dB, and better than pixels averaged eight by eight.

The latents hold 64 numbers of an image's 3,072, the averaged pixels 48.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import xoron_core

SLOT = "image.autoencoder"
STEPS, BATCH, WARM_UP, RATE = 1200, 8, 20, 1e-3


def mosaics(digits, count, seed):
    """(count, 32, 32, 3) uint8: four scans each, every one in two colours of its own."""
    rng = np.random.default_rng(seed)
    scans = digits[rng.integers(len(digits), size=(count, 4))] / 16
    ink = scans.repeat(2, axis=2).repeat(2, axis=3)[..., None]
    paper, pen = rng.integers(0, 256, (2, count, 4, 1, 1, 3))
    tiles = (paper * (1 - ink) + pen * ink).astype(np.uint8).reshape(count, 2, 2, 16, 16, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(count, 32, 32, 3)


def psnr(images, originals):
    """In dB, for (M, 3, H, W) from 0 to 1."""
    return float(-10 * torch.log10((images - originals).square().mean()))


def rate(step):
    """Of the peak: warmed up, then a cosine."""
    return min(1, (step + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / STEPS)))


@pytest.mark.slow
def test_scans_never_seen_are_reconstructed_in_eight_times_smaller_latents():
    digits = load_digits().images
    slot = {"use": "kl-image", "preset": "tiny", "pixel_loss": "l2"}
    model, processor = xoron_core.compose({"name": "x", "image": {"autoencoder": slot}})
    seen, unseen = (
        processor.media_batch(SLOT, list(mosaics(scans, count, seed)))
        for scans, count, seed in ((digits[:1400], 1024, 0), (digits[1400:], 64, 1))
    )
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(seen["pixel_values"]), (BATCH,), generator=rng)
        loss = model(media={SLOT: {"pixel_values": seen["pixel_values"][rows]}}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    model.call(SLOT, "measure_scale", [seen])
    with torch.no_grad():
        latents = model.call(SLOT, "encode", **unseen)
        decoded = model.call(SLOT, "decode", latents)
    originals = (unseen["pixel_values"] + 1) / 2
    colour = originals.mean((2, 3), keepdim=True).expand_as(originals)
    small = F.interpolate(originals, scale_factor=1 / 8, mode="bilinear", antialias=True)
    bilinear = F.interpolate(small, size=originals.shape[-2:], mode="bilinear")
    found, mean, averaged = (psnr(each, originals) for each in (decoded, colour, bilinear))
    print(f"PSNR: {found:.2f} dB; mean colour {mean:.2f}, bilinear by 8 {averaged:.2f}")
    assert found > mean + 6
    assert found > averaged
    assert latents.shape == (64, 4, 4, 4)
    assert 0.8 < float(latents.std()) < 1.25
