"""The shared blocks compute what independent implementations (transformers) compute.

Same weights, same inputs: norms, rotary tables, attention in its Llama, Mixtral and Qwen3 forms and
the feed-forward block agree within 1e-5, in values and in gradients. Rotary embedding is a rotation
whose scores depend on offsets alone.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from xoron_core.nn.attention import Attention
from xoron_core.nn.kernels import sdpa
from xoron_core.nn.masks import causal_mask
from xoron_core.nn.mlp import SwiGLU
from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import apply_rotary, rotary_tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}


def _load(target: torch.nn.Module, source: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    target.load_state_dict(source.state_dict())


def _grads(module: torch.nn.Module, output: torch.Tensor, probe: torch.Tensor) -> dict:
    (output * probe).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_llamas(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(64, eps=1e-5), LlamaRMSNorm(64, eps=1e-5)
    _load(ours, theirs)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    # Large values: statistics in half precision would be far off.
    x = (torch.randn(3, 5, 64) * 300).to(dtype)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x))


def test_swiglu_is_llamas_mlp() -> None:
    ours, theirs = SwiGLU(48, 80), LlamaMLP(LlamaConfig(**SIZES))
    _load(ours, theirs)
    x, probe = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    expected = _grads(theirs, theirs(x), probe)
    for name, grad in _grads(ours, ours(x), probe).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_rotary_is_llamas() -> None:
    config = LlamaConfig(**SIZES, rope_theta=500000.0, max_position_embeddings=131072)
    positions = torch.tensor([[0, 1, 2, 700, 131071], [5, 4, 3, 2, 1]])
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    tables = rotary_tables(positions, 8, theta=500000.0)
    assert tables[0].dtype == torch.float32
    torch.testing.assert_close(apply_rotary(q, *tables), expected_q, **CLOSE)
    torch.testing.assert_close(apply_rotary(k, *tables), expected_k, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 60000),
    st.integers(0, 60000),
    st.integers(0, 60000),
    st.sampled_from([4, 32, 64]),
)
def test_rotary_keeps_norms_and_scores_depend_on_offsets(m: int, n: int, by: int, dim: int) -> None:
    q, k = torch.randn(1, 1, 1, dim, dtype=torch.float64), torch.randn(1, 1, 1, dim)

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        tables = rotary_tables(torch.tensor([[position]]), dim, theta=10000.0)
        return apply_rotary(x.double(), *(table.double() for table in tables))

    torch.testing.assert_close(turn(q, m).norm(), q.norm(), rtol=1e-6, atol=0)
    here = (turn(q, m) * turn(k, n)).sum()
    moved = (turn(q, m + by) * turn(k, n + by)).sum()
    # fp32 angles: one unit in the last place of the position is the error allowed.
    bound = 2e-7 * (m + n + 2 * by + 10) * q.norm() * k.norm()
    assert abs(here - moved) <= bound


def test_rotary_angles_stay_fp32_under_autocast_and_for_half_inputs() -> None:
    positions = torch.tensor([[100_000, 100_001]])
    expected, _ = rotary_tables(positions, 8, theta=10000.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = rotary_tables(positions, 8, theta=10000.0)
    assert torch.equal(got, expected)
    assert not torch.equal(got[0, 0], got[0, 1])
    half = torch.randn(1, 1, 2, 8).bfloat16()
    assert apply_rotary(half, got, got).dtype == torch.bfloat16


ATTENTIONS = {
    "llama": (LlamaConfig, LlamaAttention, {}),
    "llama-mha": (LlamaConfig, LlamaAttention, {"num_key_value_heads": 6}),
    "llama-wide-heads": (LlamaConfig, LlamaAttention, {"head_dim": 16}),
    "mixtral": (MixtralConfig, MixtralAttention, {"num_key_value_heads": 3}),
    "qwen3": (Qwen3Config, Qwen3Attention, {"head_dim": 16}),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_matches_transformers(form: str, padded: bool) -> None:
    config_class, attention_class, extra = ATTENTIONS[form]
    config = config_class(**{**SIZES, **extra})
    theirs = attention_class(config, layer_idx=0)
    head_dim = theirs.head_dim
    ours = Attention(
        48,
        6,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        qk_norm_eps=config.rms_norm_eps if form == "qwen3" else None,
    )
    _load(ours, theirs)
    x, probe = torch.randn(2, 9, 48), torch.randn(2, 9, 48)
    rope = rotary_tables(torch.arange(9)[None], head_dim, theta=10000.0)
    valid = torch.ones(2, 9)
    if padded:
        valid[1, :4] = 0
    probe = probe * valid[..., None]
    mask = causal_mask(9, attention_mask=valid)
    assert (mask is None) is not padded
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed = (causal & valid.bool()[:, None, None, :]) | torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, float("-inf"))
    expected, _ = theirs(x, position_embeddings=rope, attention_mask=additive)
    got = ours(x, rope, mask=mask)
    keep = valid.bool()
    torch.testing.assert_close(got[keep], expected[keep], **CLOSE)
    wanted = _grads(theirs, expected, probe)
    for name, grad in _grads(ours, got, probe).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


def test_attend_grouped_equals_repeated_heads_and_additive_equals_boolean_mask() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    scores = q @ k.repeat_interleave(3, 1).mT / 8**0.5 + additive
    expected = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(sdpa(q, k, v, mask=mask), expected, **CLOSE)
    torch.testing.assert_close(sdpa(q, k, v, mask=additive), expected, **CLOSE)
    one = q[:, :, :1]
    alone = (one @ k.repeat_interleave(3, 1).mT / 8**0.5).softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(sdpa(one, k, v, causal=True), alone, **CLOSE)
