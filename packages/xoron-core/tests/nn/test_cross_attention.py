"""Cross-attention computes what torch's own multi-head attention computes with the same weights, in
values and gradients; it starts at zero, and queries that may look at nothing get exactly zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xoron_core.nn.cross_attention import CrossAttention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
B, N, S, D, E, H = 2, 6, 5, 32, 20, 4


@pytest.fixture
def pair() -> tuple[CrossAttention, nn.MultiheadAttention]:
    """The same weights, none of them zero, in both implementations."""
    torch.manual_seed(0)
    ours = CrossAttention(D, H, feature_size=E)
    theirs = nn.MultiheadAttention(D, H, bias=False, kdim=E, vdim=E, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.3)
        theirs.q_proj_weight.copy_(ours.q_proj.weight)
        theirs.k_proj_weight.copy_(ours.k_proj.weight)
        theirs.v_proj_weight.copy_(ours.v_proj.weight)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    return ours, theirs


def test_it_is_torchs_attention_between_normed_inputs(pair) -> None:
    ours, theirs = pair
    x, features = torch.randn(B, N, D), torch.randn(B, S, E) * 3
    visible = torch.rand(B, N, S) > 0.5
    visible[..., 0] = True
    visible[1, 3:] = False
    probe = torch.randn(B, N, D)
    got = ours(x, *ours.keys_values(features), visible=visible)
    sees = visible.any(-1)
    q = nn.functional.rms_norm(x, (D,), ours.q_norm.weight, 1e-6)
    kv = nn.functional.rms_norm(features, (E,), ours.kv_norm.weight, 1e-6)
    hidden = (~visible).repeat_interleave(H, 0) & sees.repeat_interleave(H, 0)[..., None]
    expected, _ = theirs(q, kv, kv, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(got[sees], expected[sees], **CLOSE)
    assert not got[~sees].any()
    (got * probe).sum().backward()
    (expected * probe * sees[..., None]).sum().backward()
    for name, gradient in (
        ("q_proj", theirs.q_proj_weight.grad),
        ("k_proj", theirs.k_proj_weight.grad),
        ("v_proj", theirs.v_proj_weight.grad),
        ("o_proj", theirs.out_proj.weight.grad),
    ):
        torch.testing.assert_close(getattr(ours, name).weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_without_a_mask_everything_is_seen(pair) -> None:
    ours, _ = pair
    x, features = torch.randn(B, N, D), torch.randn(B, S, E)
    kept = ours.keys_values(features)
    everywhere = torch.ones(B, N, S, dtype=torch.bool)
    torch.testing.assert_close(ours(x, *kept), ours(x, *kept, visible=everywhere), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_starts_at_zero_and_is_finite_where_nothing_is_seen(dtype: torch.dtype) -> None:
    block = CrossAttention(D, H, feature_size=E).to(dtype)
    x, features = torch.randn(B, N, D).to(dtype) * 100, torch.zeros(B, S, E).to(dtype)
    out = block(x, *block.keys_values(features), visible=torch.zeros(B, N, S, dtype=torch.bool))
    assert not out.any()
    features = torch.randn(B, S, E).to(dtype) * 100
    assert not block(x, *block.keys_values(features)).any()
    out.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters())
