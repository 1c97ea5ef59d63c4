"""Weights that a file left at an odd offset are moved to an aligned one; nothing else changes."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xoron_core.nn.memory import ALIGNMENT, align_weights


def test_weights_mapped_from_a_file_are_aligned_with_values_and_ties_kept(tmp_path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Linear(8, 5, bias=False)})
    file = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.randn(5, 8), "a.bias": torch.randn(5)}, file, {"pad": "x" * 3})
    state = load_file(file)
    model.load_state_dict({**state, "b.weight": state["a.weight"]}, assign=True)
    model["b"].weight = model["a"].weight
    model["a"].weight.requires_grad_(False)
    assert any(p.data_ptr() % ALIGNMENT for p in model.parameters())
    kept = model["a"].weight
    align_weights(model)
    assert not any(p.data_ptr() % ALIGNMENT for p in model.parameters())
    assert model["a"].weight is kept is model["b"].weight
    assert not kept.requires_grad
    assert torch.equal(kept, state["a.weight"])
    assert torch.equal(model["a"].bias, state["a.bias"])
    align_weights(nn.Linear(2, 2, device="meta"))
