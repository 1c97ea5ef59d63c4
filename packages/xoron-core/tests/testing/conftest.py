"""A small correct plug-in, as source that is not installed, to run the kit on and to break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = {
    "": """
from xoron_core.descriptors import Component, Modality, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1
MARKS = [f"<|dots{n}|>" for n in range(5)]


@hookimpl
def xoron_components():
    return [
        Component(
            kind="encoder", name="dots", modality="dots", factory="NAME_parts:DotsEncoder",
            config="NAME_config:DotsConfig", summary="Points to features.",
        )
    ]


@hookimpl
def xoron_modalities():
    places = {"load": "NAME_config:load", "sample": "NAME_config:sample"}
    return [Modality("dots", ("dots",), *MARKS, **places)]


@hookimpl
def xoron_token_groups():
    return [TokenGroup("dots/marks", {mark[2:-2]: mark for mark in MARKS})]
""",
    "_config": """
import numpy as np

from xoron_core.config import Config


class DotsConfig(Config):
    width: int = 6


def load(source):
    return np.asarray(source, dtype=np.float32)


def sample(seed, size):
    return np.random.default_rng(seed).standard_normal((size, 3))
""",
    "_parts": """
import torch
from torch import nn

from xoron_core.components import Encoder, Features


class Processor:
    def load(self, media):
        return {"dots": media}

    def collate(self, items):
        counts = torch.tensor([len(item["dots"]) for item in items])
        dots = torch.zeros(len(items), int(counts.max()), 3)
        for row, item in zip(dots, items, strict=True):
            row[: len(item["dots"])] = torch.from_numpy(item["dots"])
        return {"dots": dots, "mask": torch.arange(dots.shape[1]) < counts[:, None]}

    def num_positions(self, item):
        return len(item["dots"])


class DotsEncoder(Encoder):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.feature_size = config.width
        self.embed = nn.Linear(3, config.width)

    @classmethod
    def processor(cls, config):
        return Processor()

    def dummy_batch(self):
        return {"dots": torch.zeros(1, 2, 3), "mask": torch.ones(1, 2, dtype=torch.bool)}

    def forward(self, dots, mask):
        return Features(self.embed(dots), mask)
""",
}


@pytest.fixture
def dots(tmp_path: Path) -> Callable[..., Path]:
    """Writes the plug-in under a name of its own, with replacements; returns its module file."""

    def write(name: str, **replacements: tuple[str, str]) -> Path:
        for suffix, source in SOURCES.items():
            old, new = replacements.get(suffix.lstrip("_") or "plugin", ("", ""))
            assert old in source
            text = source.replace(old, new, 1).replace("NAME", name)
            (tmp_path / f"{name}{suffix}.py").write_text(text, encoding="utf-8")
        return tmp_path / f"{name}.py"

    return write
