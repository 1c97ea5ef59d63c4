"""Composing a codec, and recordings for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xoron_core
from xoron_audio.audio import sample_audio

SLOT = "audio.codec"


@pytest.fixture
def compose():
    """Composes one codec, alone, under one seed."""

    def make(use: str, **slot: Any):
        torch.manual_seed(0)
        data = {"name": "x", "audio": {"codec": {"use": use, **slot}}}
        model, processor = xoron_core.compose(data, plugins="audio")
        return model.eval(), processor

    return make


@pytest.fixture
def media():
    """Made-up recordings of these sizes, as a batch for the codec."""

    def make(processor: Any, *sizes: int):
        recordings = [sample_audio(seed, size) for seed, size in enumerate(sizes, 1)]
        return processor.media_batch(SLOT, recordings)

    return make
