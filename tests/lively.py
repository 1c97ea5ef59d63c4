"""Models whose text says something about how it was made."""

from __future__ import annotations

from typing import Any

import torch

import xoron_core


def lively(*options: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny text model of large random weights, and its processor.

    What it says depends on all that was said, does not repeat itself and is no near tie. (Tied
    small weights only echo the last id.)

    Args:
        options: further overrides.
        seed: of the weights.
    """
    overrides = ["backbone.num_layers=2", "backbone.tie_word_embeddings=false", *options]
    model, processor = xoron_core.compose(
        plugins="llm", preset="tiny", overrides=overrides, seed=seed
    )
    enliven(model)
    return model, processor


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Gives every matrix of a model the same large spread, in place."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "router" not in name:
            parameter.mul_(0.16 / parameter.std())


def ids_of(model: Any, processor: Any, text: str) -> torch.Tensor:
    """(1, N): the ids of a text behind the begin-of-sequence token."""
    ids = [processor.tokenizer.bos_token_id, *processor.encode_text(text)]
    return torch.tensor([ids])
