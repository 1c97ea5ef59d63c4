"""Small models and inputs shared by the tests of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_experts": 4,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,
}


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Keywords of a small xoron-moe config whose weights are large enough to tell paths apart."""
    return dict(SIZES)


@pytest.fixture
def make() -> Callable[..., Any]:
    """Makes the same small model each time, with changed config keys if given."""
    from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM

    def build(**changes: Any) -> XoronMoeForCausalLM:
        torch.manual_seed(0)
        return XoronMoeForCausalLM(XoronMoeConfig(**{**SIZES, **changes})).eval()

    return build


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Makes (rows, length) ids of 1 .. 66."""

    def draw(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, 67, (rows, length), generator=generator)

    return draw
