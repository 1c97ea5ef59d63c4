"""Mixture of experts: sorted dispatch equals a loop over tokens, and transformers' DeepSeek-V3.

Also: each token's result is its own affair, routing is fp32 under autocast, and every expert gets a
gradient tensor even when no token chose it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from xoron_core.nn.moe import MoE, TopKRouter


def _moe(seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(24, 32, **{"num_experts": 6, "top_k": 2, **changes})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def _slow(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            token = x[b, n]
            scores = torch.sigmoid(moe.router.weight @ token)
            best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: moe.router.top_k]
            total = sum(scores[e] for e in best)
            for e in best:
                out[b, n] += scores[e] / total * moe.experts[e](token)
            if moe.shared_expert is not None:
                out[b, n] += moe.shared_expert(token)
    return out


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 1}, {"top_k": 6}, {"num_experts": 1, "top_k": 1}, {"use_shared_expert": False}],
)
def test_dispatch_equals_a_loop_over_tokens(changes: dict) -> None:
    moe = _moe(**changes)
    x, probe = torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 7, 24)
    expected = _slow(moe, x)
    torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *moe.parameters()]
    slow = torch.autograd.grad((expected * probe).sum(), inputs, allow_unused=True)
    fast = torch.autograd.grad((moe(x) * probe).sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


def test_equals_deepseek_v3_without_groups() -> None:
    ours = _moe()
    config = DeepseekV3Config(
        hidden_size=24,
        moe_intermediate_size=32,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
    )
    theirs = DeepseekV3MoE(config)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        for e, expert in enumerate(ours.experts):
            gate_up = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            theirs.experts.gate_up_proj[e].copy_(gate_up)
            theirs.experts.down_proj[e].copy_(expert.down_proj.weight)
        theirs.shared_experts.load_state_dict(ours.shared_expert.state_dict())
        x = torch.randn(3, 11, 24)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_the_others() -> None:
    moe, x = _moe(), torch.randn(1, 12, 24)
    changed = x.clone()
    changed[0, 5:] = torch.randn(7, 24) * 50
    with torch.no_grad():
        torch.testing.assert_close(moe(changed)[0, :5], moe(x)[0, :5], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moe(x[:, 3:4]), moe(x)[:, 3:4], rtol=1e-6, atol=1e-6)
        assert moe(x[:, :0]).shape == (1, 0, 24)


def test_router_weights_sum_to_one_and_are_decided_in_fp32_under_autocast() -> None:
    router = TopKRouter(64, 8, top_k=3)
    with torch.no_grad():
        # Scores that bf16 cannot tell apart.
        router.weight.copy_(torch.ones(8, 64) + torch.arange(8)[:, None] * 1e-4)
    x = torch.full((5, 64), 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights, experts = router(x)
    assert weights.dtype == torch.float32
    assert experts.sort(-1).values.tolist() == [[5, 6, 7]] * 5
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_every_expert_gets_a_gradient_and_none_runs_for_nothing_without_gradients() -> None:
    moe = _moe()
    with torch.no_grad():
        moe.router.weight[1:] = -moe.router.weight[:1].abs() * 10
        moe.router.weight[:2] = moe.router.weight[:1].abs() * 10
    x = torch.rand(1, 3, 24)
    moe(x).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    assert moe.experts[0].up_proj.weight.grad.abs().sum() > 0
    assert moe.experts[5].up_proj.weight.grad.abs().sum() == 0
    calls: list[int] = []
    for index, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda *_, i=index: calls.append(i))
    with torch.no_grad():
        moe(x)
    assert calls == [0, 1]
