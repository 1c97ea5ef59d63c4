"""Proves that what `xoron inspect` prints per cached token is what a model really holds in memory.

Counted in the cache that each architecture makes: keys and values, latents, windows, layers that
hold no positions, layers that share theirs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xoron_core.cli.inspect import print_plan
from xoron_core.components import Context
from xoron_core.composer.composition import read_composition
from xoron_core.composer.planner import plan
from xoron_core.plugins import registry
from xoron_llm.hf_backbone import HfBackbone
from xoron_llm.hf_config import HfConfig

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": LATENT,
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gemma3n_text": {
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 300,
    },
    "qwen3_next": {
        "head_dim": 8,
        "num_experts": 0,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "xoron-moe": {"num_experts": 4},
}
PER_LAYER = {"llama": 32, "qwen3": 64, "deepseek_v3": 16 + 4, "xoron-moe": 32}


def _composition(kind: str) -> dict[str, Any]:
    return {
        "name": "cached",
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "hf", "hf_config": {"model_type": kind, **SIZES, **KINDS[kind]}},
        "tokens": {"groups": ["control"]},
    }


@torch.no_grad()
def _held(backbone: HfBackbone, length: int) -> int:
    """Bytes of keys and values after that many positions."""
    cache = backbone(torch.randn(1, length, 32), use_cache=True).cache
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_declared_is_what_the_cache_grows_by(kind: str) -> None:
    config = HfConfig.parse({"hf_config": {"model_type": kind, **SIZES, **KINDS[kind]}})
    backbone = HfBackbone(config, Context(slot="backbone")).eval()
    assert _held(backbone, 6) - _held(backbone, 5) == 4 * backbone.cache_width() > 0
    if kind in PER_LAYER:
        assert backbone.cache_width() == 4 * PER_LAYER[kind]


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_inspect_prints_it(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = registry().select(["llm"])
    print_plan(plan(read_composition(chosen, data=_composition(kind)), chosen))
    bytes_per_token = 4 * 4 * PER_LAYER[kind]
    assert f"cache: {bytes_per_token:,} bytes per token" in capsys.readouterr().out
