"""How far two sounds are apart: log-mel spectra in windows of several lengths.

Long windows tell pitches apart, short ones moments; no single window does both (Yamamoto et al.
2020, "Parallel WaveGAN"; with mel bands as in DAC, Kumar et al. 2023).

Sounds are followed by zeros, as padding is, and silence beside silence adds nothing: the sum over a
padded batch is that of its items alone, so the count need only know how long each is.

Shapes: M sounds, L samples, F frequencies, B bands, K frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a full-scale wave: below, everything is silence.
FLOOR = 1e-4


def log_mel_error(sounds: Tensor, others: Tensor, *, rate: int, windows: tuple[int, ...]) -> Tensor:
    """The sum of absolute differences of log-mel spectra, in nats.

    Args:
        sounds, others: (M, L), zero behind their ends.
        rate: samples per second.
        windows: their samples, multiples of 4; frames are a quarter of a window apart.

    Returns:
        A scalar, the sum over sounds, windows, frames and bands.
    """
    pair = torch.stack([sounds.float(), others.float()])
    total = pair.new_zeros(())
    for window in windows:
        ours, theirs = log_mel(pair.flatten(0, 1), rate=rate, window=window).unflatten(0, (2, -1))
        total = total + (ours - theirs).abs().sum()
    return total


def log_mel_count(num_samples: Tensor, *, rate: int, windows: tuple[int, ...]) -> Tensor:
    """How many numbers the error of sounds of these lengths (M,) sums over, as a fp32 scalar: those
    of all frames that reach into a sound, however little."""
    sizes = [mel_bands(window, rate).shape[1] for window in windows]
    frames = [(2 - (-num_samples // (window // 4))).sum() for window in windows]
    return torch.stack([b * k for b, k in zip(sizes, frames, strict=True)]).sum().float()


def log_mel(sounds: Tensor, *, rate: int, window: int) -> Tensor:
    """(M, L) to (M, B, K), the logarithm of magnitudes in mel bands, a full-scale wave near 0.

    Frames begin half a window before the sound; the last ones reach beyond its end.
    """
    shape = torch.hann_window(window, device=sounds.device)
    padded = F.pad(sounds, (window // 2, window))
    spectra = torch.stft(
        padded, window, window // 4, window=shape, center=False, return_complex=True
    )
    bands = mel_bands(window, rate).to(sounds.device)
    magnitudes = spectra.abs() * (2 / shape.sum())
    return (bands.T @ magnitudes).clamp(min=FLOOR).log()


@lru_cache
def mel_bands(window: int, rate: int) -> Tensor:
    """(F, B) triangles of equal width in mels (O'Shaughnessy 1987), without those between two
    frequencies of the window, which would hold nothing; B is at most an eighth of the window."""
    top = _mels(torch.tensor(rate / 2, dtype=torch.float64))
    corners = torch.linspace(0, 1, max(2, window // 8) + 2, dtype=torch.float64) * top
    places = _mels(torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64))
    width = corners[1]
    bands = (1 - (places[:, None] - corners[1:-1]).abs() / width).clamp(min=0)
    return bands[:, bands.sum(0) > 0].float()


def _mels(hertz: Tensor) -> Tensor:
    return 2595 * (1 + hertz / 700).log10()
