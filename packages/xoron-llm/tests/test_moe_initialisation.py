"""Proves that the README's table of initial weights is what a new model has, tensor by tensor.

The table is read from the README: every parameter and buffer is in exactly one of its rows, and its
mean and spread are what the row says, within five standard errors.
"""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM

README = Path(__file__).parents[1] / "README.md"
LATENT = {"attention": "latent", "num_key_value_heads": None, "q_lora_rank": 24}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {"initializer_range": 0.05},
    "tied": {"initializer_range": 0.02, "tie_word_embeddings": True},
    "latent": {"initializer_range": 0.05, **LATENT, "kv_lora_rank": 32},
}


def _table() -> dict[str, str]:
    """Tensor pattern to distribution, from the rows under the heading."""
    section = README.read_text(encoding="utf-8").split("## Initial weights")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1].strip("`"))
    return found


def _has_spread(tensor: Tensor, std: float) -> bool:
    number, values = tensor.numel(), tensor.detach().double()
    off = abs(float(values.std()) / std - 1) * math.sqrt(2 * number)
    return off < 5 and abs(float(values.mean())) * math.sqrt(number) / std < 5


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_starts_as_the_table_says(kind: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = XoronMoeConfig(**{**sizes, "hidden_size": 64, "vocab_size": 512, **KINDS[kind]})
    model, table = XoronMoeForCausalLM(config), _table()
    assert set(table.values()) == {"N(0, r)", "1", "0"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        rows = [pattern for pattern in table if fnmatchcase(name, pattern)]
        assert len(rows) == 1, (name, rows)
        if table[rows[0]] == "N(0, r)":
            assert _has_spread(tensor, config.initializer_range), name
        else:
            assert (tensor == float(table[rows[0]])).all(), name


def test_no_row_of_the_table_is_left_over(sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        models = [XoronMoeForCausalLM(XoronMoeConfig(**{**sizes, **c})) for c in KINDS.values()]
    names = {name for model in models for name in model.state_dict()}
    for pattern in _table():
        assert any(fnmatchcase(name, pattern) for name in names), pattern
