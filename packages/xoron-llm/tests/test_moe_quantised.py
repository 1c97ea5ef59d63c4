"""Proves that `quantization_config` opens xoron-moe and composed models in eight bits.

Attention and experts are really quantised, router, norms, embedding and head are not; logits stay
close and text is generated. One test per backend that is installed (torchao, optimum-quanto,
bitsandbytes); the others are skipped by name.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.utils import (
    is_bitsandbytes_available,
    is_optimum_quanto_available,
    is_torchao_available,
)

import xoron_core

INSTALLED = {
    "torchao": is_torchao_available,
    "optimum-quanto": is_optimum_quanto_available,
    "bitsandbytes": is_bitsandbytes_available,
}
HEAD = "lm_head"
SKIPPED = [f".*{HEAD}"]
LATENT = {"attention": "latent", "num_kv_heads": None, "kv_lora_rank": 16, "qk_nope_head_dim": 24}
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}


def _config(backend: str) -> Any:
    if not INSTALLED[backend]():
        pytest.skip(f"{backend} is not installed; run: pip install {backend}")
    if backend == "torchao":
        kind = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
        return TorchAoConfig(kind, modules_to_not_convert=SKIPPED)
    if backend == "optimum-quanto":
        return QuantoConfig(weights="int8", modules_to_not_convert=SKIPPED)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED)


@torch.no_grad()
def _check(exact: nn.Module, small: Any) -> None:
    theirs = dict(small.named_modules())
    for name, module in exact.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            weight = theirs[name].weight
            same = type(weight) is nn.Parameter and torch.equal(weight, module.weight)
            assert same is not (isinstance(module, nn.Linear) and not name.endswith(HEAD)), name
    x = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, got = exact(x).logits, small(x).logits.float()
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < 0.1
    text = small.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 28)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_from_pretrained_quantises_matrices_and_nothing_else(
    backend: str, kind: str, tmp_path: Path, make: Any
) -> None:
    config, changes = _config(backend), LATENT if kind == "latent" else {}
    changes = {**changes, "vocab_size": 256, "hidden_size": 64, "head_dim": None}
    exact = make(**changes, initializer_range=0.05)
    exact.save_pretrained(tmp_path)
    _check(exact, AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("kind", ["xoron-moe", "hf"])
def test_so_does_a_composed_model(backend: str, kind: str, tmp_path: Path) -> None:
    config, backbone = _config(backend), {"use": kind, **SIZES, "num_experts": 4}
    if kind == "hf":
        names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        sizes = {names.get(name, name): value for name, value in SIZES.items()}
        backbone = {"use": kind, "hf_config": {"model_type": "llama", "vocab_size": 256, **sizes}}
    composition = {"tokenizer": {"use": "byte"}, "backbone": backbone}
    model, processor = xoron_core.compose(composition, plugins=["llm"], seed=0)
    xoron_core.save(model, processor, tmp_path)
    _check(model.eval(), xoron_core.load(tmp_path, quantization_config=config)[0])
