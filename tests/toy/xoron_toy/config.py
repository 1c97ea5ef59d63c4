"""Configs, loading and the processor of the toy plug-in: no torch at import."""

from pathlib import Path

import numpy as np

from xoron_core.config import Config

PATCH = 4  # samples per feature, latent or codec step


class EncoderConfig(Config):
    width: int = 16


class ProjectorConfig(Config):
    pass


class CodecConfig(Config):
    levels: int = 8
    delay: int = 0


class AutoencoderConfig(Config):
    latent: int = 4


class GeneratorConfig(Config):
    num_patches: int = 4
    autoencoder: str = "signal.autoencoder"


class LossConfig(Config):
    of: str = "signal.autoencoder"


def load_signal(source):
    """A path to a text file of numbers, or anything array-like, to a 1-D fp32 array."""
    if isinstance(source, str | Path):
        source = np.loadtxt(source)
    return np.asarray(source, dtype=np.float32).reshape(-1)


def sample_signal(seed, size):
    """A made-up signal of `size` patches, the last one not full."""
    return np.random.default_rng(seed).standard_normal(size * PATCH - 1).astype(np.float32)


class SignalProcessor:
    """Signals to whole patches, zero-padded."""

    def load(self, media):
        patches = -(-len(media) // PATCH)
        return {"patches": np.pad(media, (0, patches * PATCH - len(media))).reshape(patches, PATCH)}

    def collate(self, items):
        import torch

        counts = torch.tensor([len(item["patches"]) for item in items])
        values = torch.zeros(len(items), int(counts.max()), PATCH)
        for row, item in zip(values, items, strict=True):
            row[: len(item["patches"])] = torch.from_numpy(item["patches"])
        return {"patches": values, "mask": torch.arange(values.shape[1]) < counts[:, None]}

    def num_positions(self, item):
        return len(item["patches"])
