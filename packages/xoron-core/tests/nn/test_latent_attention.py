"""Latent attention is transformers' DeepSeek-V3 attention, in every form it is computed in.

Values and gradients agree with `DeepseekV3Attention` (with and without a query latent, with widths
that need padding, with YaRN's scores); the absorbed form equals the expanded one to 1e-5; the cache
holds r + d_rope numbers per position; no path runs on the math kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from xoron_core.nn.latent_attention import LatentAttention
from xoron_core.nn.masks import causal_mask
from xoron_core.nn.rope import rotary_tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FORMS: dict[str, dict[str, Any]] = {
    "even": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "query-latent": {
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "q_lora_rank": 24,
    },
    "wide-query": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "wide-value": {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 20},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def _pair(form: str, **rope: Any) -> tuple[LatentAttention, DeepseekV3Attention]:
    sizes = {"q_lora_rank": None, **FORMS[form], "kv_lora_rank": 32}
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    config = DeepseekV3Config(
        hidden_size=40,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_interleave=False,
        rope_parameters=rope,
        attn_implementation="eager",
        **sizes,
    )
    factor = (0.1 * torch.tensor(4.0).log().item() + 1) ** 2 if "factor" in rope else 1.0
    torch.manual_seed(0)
    theirs = DeepseekV3Attention(config, layer_idx=0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = LatentAttention(40, 4, logit_factor=factor, **sizes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _rope(length: int, dim: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(torch.arange(start, start + length)[None], dim, theta=10000.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rope", [{}, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_deepseek_v3s(form: str, rope: dict, padded: bool) -> None:
    ours, theirs = _pair(form, **rope)
    x, probe = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    valid = torch.ones(2, 9)
    if padded:
        valid[1, :4] = 0
    keep = valid.bool()
    allowed = torch.ones(9, 9, dtype=torch.bool).tril() & keep[:, None, None, :]
    allowed = allowed | torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, float("-inf"))
    tables = _rope(9, ours.rope)
    mask = causal_mask(9, attention_mask=valid)
    assert (mask is not None) is padded
    expected, _ = theirs(x, position_embeddings=tables, attention_mask=additive)
    got = ours(x, tables, mask=mask)
    torch.testing.assert_close(got[keep], expected[keep], **CLOSE)
    probe = probe * valid[..., None]
    wanted = torch.autograd.grad((expected * probe).sum(), list(theirs.parameters()))
    grads = torch.autograd.grad((got * probe).sum(), list(ours.parameters()))
    names = dict(zip((n for n, _ in theirs.named_parameters()), wanted, strict=True))
    for (name, _), grad in zip(ours.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, names[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 3])
def test_absorbed_equals_expanded(form: str, queries: int, masked: bool) -> None:
    ours, _ = _pair(form)
    q = torch.randn(2, 4, queries, ours.nope), torch.randn(2, 4, queries, ours.rope)
    rows = torch.randn(2, 11, 32 + ours.rope)
    mask = None
    if masked or queries > 1:
        attention_mask = torch.ones(2, 11)
        attention_mask[0, :5] = 0
        mask = causal_mask(queries, past=11 - queries, attention_mask=attention_mask)
        assert mask is not None
    absorbed = ours.absorbed(*q, rows, mask=mask)
    torch.testing.assert_close(absorbed, ours.expanded(*q, rows, mask=mask), **CLOSE)
    if mask is not None:
        additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(ours.absorbed(*q, rows, mask=additive), absorbed, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("form", ["even", "query-latent"])
def test_the_cache_holds_one_row_per_position_and_decoding_absorbs(form: str, monkeypatch) -> None:
    ours, _ = _pair(form)
    x, cache = torch.randn(2, 7, 40), DynamicCache()
    expected = ours(x, _rope(7, ours.rope))
    first = ours(x[:, :4], _rope(4, ours.rope), cache=cache)
    expansions: list[int] = []
    ours.kv_b_proj.register_forward_hook(lambda *_: expansions.append(1))
    rest = [ours(x[:, n : n + 1], _rope(1, ours.rope, start=n), cache=cache) for n in range(4, 7)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, **CLOSE)
    assert expansions == []
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 1, 7, 32 + 8)
    assert layer.values.numel() == 0


@torch.no_grad()
def test_many_new_queries_over_a_cache_expand() -> None:
    ours, _ = _pair("even")
    # The rule counts multiplications: with r = 32 and n + v = 24, 20 queries are worth expanding.
    x, cache = torch.randn(1, 24, 40), DynamicCache()
    expected = ours(x, _rope(24, ours.rope))
    ours(x[:, :4], _rope(4, ours.rope), cache=cache)
    calls: list[int] = []
    ours.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
    mask = causal_mask(20, past=4)
    got = ours(x[:, 4:], _rope(20, ours.rope, start=4), mask=mask, cache=cache)
    torch.testing.assert_close(got, expected[:, 4:], **CLOSE)
    assert calls == [1]


class _Doubled(torch.nn.Module):
    """Stands in for a wrapped layer: it has no weight of its own to read."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@torch.no_grad()
def test_a_wrapped_projection_is_absorbed_too() -> None:
    ours, _ = _pair("even")
    ours.kv_b_proj = _Doubled(ours.kv_b_proj)
    q, rows = (torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8)), torch.randn(1, 6, 40)
    torch.testing.assert_close(ours.absorbed(*q, rows), ours.expanded(*q, rows), **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_attention_runs_on_the_flash_kernel(form: str, padded: bool) -> None:
    ours, _ = _pair(form)
    valid = torch.ones(2, 40)
    if padded:
        valid[0, :3] = 0
    x, cache = torch.randn(2, 40, 40), DynamicCache()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = ours(
            x[:, :39], _rope(39, ours.rope), mask=causal_mask(39, attention_mask=valid[:, :39])
        )
        out.sum().backward()
        with torch.no_grad():
            ours(x[:, :39], _rope(39, ours.rope), cache=cache)
            mask = causal_mask(1, past=39, attention_mask=valid)
            ours(x[:, 39:], _rope(1, ours.rope, start=39), mask=mask, cache=cache)
    names = {event.key for event in seen.key_averages()}
    assert any("scaled_dot_product_flash_attention" in name for name in names)
    assert not any("attention_math" in name for name in names)
