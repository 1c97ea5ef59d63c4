"""Experts balance themselves, by a bias that is moved outside `forward` and outside the gradient.

On skewed data the maximum load over the mean falls below 1.3 within 300 steps with no auxiliary
loss, and stays above 2 with the bias frozen. The bias decides choices and never weights; padding is
routed nowhere and counted nowhere; statistics, the sequence-wise balance loss and the z-loss equal
their formulas; the grouped kernel and the masked form equal the sliced one.
"""

from __future__ import annotations

import pytest
import torch

from xoron_core.nn import experts as kernels
from xoron_core.nn.experts import run_experts
from xoron_core.nn.moe import Groups, MoE, TopKRouter, balance_metrics

EXPERTS = 8


def _moe(seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(16, 24, **{"num_experts": EXPERTS, "top_k": 2, **changes})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def _train(speed: float, scoring: str) -> list[float]:
    """Maximum over mean load per step of a block that regresses on skewed inputs."""
    torch.manual_seed(0)
    moe = MoE(16, 24, num_experts=EXPERTS, top_k=2, scoring=scoring)
    target = torch.nn.Linear(16, 16)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(1)
    common = torch.randn(16, generator=rng)
    ratios = []
    for _ in range(300):
        # Skewed: all inputs share a large component, so that one router row wins them all.
        x = common + torch.randn(4, 256, 16, generator=rng)
        out, seen = moe(x, observe=True)
        (out - torch.tanh(target(x).detach())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.router.update_selection_bias(seen.load, speed)
        ratios.append(float(seen.load.max() / seen.load.mean()))
    return ratios


@pytest.mark.parametrize(("scoring", "speed"), [("sigmoid", 0.003), ("softmax", 0.002)])
def test_skewed_data_is_balanced_by_the_bias_and_by_nothing_else(
    scoring: str, speed: float
) -> None:
    frozen, moved = _train(0.0, scoring), _train(speed, scoring)
    assert min(frozen[-50:]) > 2
    assert sum(moved[-50:]) / 50 < 1.3
    assert moved[0] == frozen[0] > 2


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_bias_chooses_and_never_weighs(scoring: str, normalize: bool) -> None:
    torch.manual_seed(0)
    router = TopKRouter(
        16, EXPERTS, top_k=2, scoring=scoring, normalize=normalize, scaling_factor=2.5
    )
    x = torch.randn(20, 16)
    router.selection_bias[5] = 10.0
    _, weights, experts = router(x)
    logits = x @ router.weight.T
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    others = scores.clone()
    others[:, 5] = 0
    assert (experts[:, 0] == 5).all()
    assert torch.equal(experts[:, 1], others.argmax(-1))
    expected = torch.stack([scores[:, 5], others.max(-1).values], -1)
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, 2.5 * expected)
    assert not router.selection_bias.requires_grad
    assert "selection_bias" in router.state_dict()
    weights.sum().backward()
    assert router.weight.grad is not None


def test_the_bias_moves_by_the_sign_of_the_missing_load() -> None:
    router = TopKRouter(4, 4, top_k=1)
    router.update_selection_bias(torch.tensor([10, 2, 6, 6]), 0.5)
    assert router.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_forward_changes_no_state() -> None:
    moe = _moe().train()
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    for _ in range(3):
        moe(torch.randn(2, 5, 16), observe=True)[0].sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in moe.state_dict().items())


def test_padding_is_routed_nowhere_and_counted_nowhere() -> None:
    moe, x = _moe(), torch.randn(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = valid[1, 7:] = False
    out, seen = moe(x, valid, observe=True)
    alone, expected = moe(x[valid][None], observe=True)
    torch.testing.assert_close(out[valid], alone[0])
    # Padding gets the shared expert's output alone.
    torch.testing.assert_close(out[~valid], moe.shared_expert(x[~valid]))
    assert torch.equal(seen.load, expected.load)
    assert seen.load.sum() == 2 * valid.sum()
    for name in ("tokens", "entropy", "z"):
        torch.testing.assert_close(getattr(seen, name), getattr(expected, name))
    other = torch.where(valid[..., None], x, torch.randn(2, 9, 16) * 9)
    again, counted = moe(other, valid, observe=True)
    assert torch.equal(again[valid], out[valid])
    torch.testing.assert_close(counted.balance, seen.balance)
    nobody, nothing = moe(x, torch.zeros_like(valid), observe=True)
    torch.testing.assert_close(nobody, moe.shared_expert(x))
    assert [float(t.detach().sum()) for t in nothing] == [0.0] * 6


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_statistics_and_losses_equal_their_formulas(scoring: str) -> None:
    moe, x = _moe(scoring=scoring), torch.randn(3, 7, 16)
    moe.router.selection_bias.normal_()
    valid = torch.rand(3, 7) > 0.3
    valid[2] = False
    _, seen = moe(x, valid, observe=True)
    logits = x @ moe.router.weight.T
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    balance = entropy = z = 0.0
    load = torch.zeros(EXPERTS)
    for b in range(2):
        picked, share = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
        for n in valid[b].nonzero().flatten():
            p = scores[b, n] / scores[b, n].sum()
            picked[scores[b, n].topk(2).indices] += 1
            load[(scores[b, n] + moe.router.selection_bias).topk(2).indices] += 1
            share += p
            entropy -= float((p * p.log()).sum())
            z += logits[b, n].exp().sum().log() ** 2
        count = valid[b].sum()
        balance += ((picked * EXPERTS / (2 * count)) * (share / count)).sum()
    assert torch.equal(seen.load, load)
    assert seen.rows == 2
    assert seen.tokens == valid.sum()
    torch.testing.assert_close(seen.entropy, torch.tensor(entropy))
    for got, expected in ((seen.balance, balance), (seen.z, z)):
        torch.testing.assert_close(got, expected)
        assert expected > 0
        ours, theirs = (
            torch.autograd.grad(t, moe.router.weight, retain_graph=True)[0] for t in (got, expected)
        )
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not seen.load.requires_grad
    assert not seen.entropy.requires_grad


def test_groups_are_observed_apart_and_add_up() -> None:
    """Two groups that prefer different experts, and padding that belongs to either."""
    moe, x = _moe(), torch.randn(2, 9, 16)
    likes = moe.router.weight.detach()[1]
    index = torch.tensor([[0] * 5 + [2] * 4, [2] * 3 + [0] * 6])
    x = torch.where(index[..., None] == 0, 9 * likes, -9 * likes) + 0.1 * x
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 0] = valid[1, 1] = False
    out, seen = moe(x, valid, observe=True, groups=Groups(index, 3))
    plain, whole = moe(x, valid, observe=True)
    assert torch.equal(out, plain)
    assert seen.load.shape == (3, EXPERTS)
    assert (seen.load[0] * seen.load[2]).sum() == 0  # no expert that both like
    for group in range(3):
        mine = valid & (index == group)
        _, alone = moe(x, mine, observe=True)
        assert torch.equal(seen.load[group], alone.load)
        assert seen.tokens[group] == mine.sum()
        torch.testing.assert_close(seen.entropy[group], alone.entropy)
    assert torch.equal(seen.load.sum(0), whole.load)
    for name in ("balance", "rows", "z"):
        assert torch.equal(getattr(seen, name), getattr(whole, name))


def test_metrics_say_what_even_uneven_and_dropped_is() -> None:
    even = balance_metrics(
        torch.full((4,), 5.0), torch.tensor(10.0), 10 * torch.tensor(4.0).log(), top_k=2
    )
    wanted = {"max_load": 1.0, "min_load": 1.0, "entropy": 1.0, "dropped": 0.0}
    assert even == pytest.approx(wanted)
    load, tokens = torch.tensor([17.0, 0, 0, 0]), torch.tensor(20.0)
    uneven = balance_metrics(load, tokens, torch.tensor(0.0), top_k=1)
    assert uneven == {"max_load": 4.0, "min_load": 0.0, "entropy": 0.0, "dropped": 3.0}
    both = (torch.stack(pair) for pair in ((load, load.flip(0) * 0), (tokens, 0 * tokens)))
    apart = balance_metrics(*both, torch.zeros(2), top_k=1, names=("text", "image"))
    assert apart == uneven | {f"text/{name}": value for name, value in uneven.items()}


@pytest.mark.parametrize("kernel", ["grouped", "masked"])
@pytest.mark.parametrize("padded", [False, True])
def test_each_kernel_equals_slices(kernel: str, padded: bool) -> None:
    moe, x = _moe(), torch.randn(13, 16, requires_grad=True)
    _, weights, chosen = moe.router(x)
    if padded:
        chosen = chosen.masked_fill((torch.arange(13) % 3 == 0)[:, None], EXPERTS)
    chosen = chosen.masked_fill(chosen == 3, 4)  # an expert without tokens
    inputs = [x, *moe.experts.parameters(), moe.router.weight]

    def run(form: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        if form == "masked":
            out = kernels._all_masked(moe.experts, x, weights=weights, chosen=chosen)
        else:
            out = run_experts(moe.experts, x, weights=weights, chosen=chosen, kernel=form)
        probe = torch.randn(13, 16, generator=torch.Generator().manual_seed(2))
        return out, torch.autograd.grad((out * probe).sum(), inputs, retain_graph=True)

    expected, wanted = run("slices")
    got, gradients = run(kernel)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert sum(float(g.abs().sum()) > 0 for g in wanted) > 15
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_experts_that_are_no_plain_layers_run_as_slices(monkeypatch) -> None:
    """The grouped kernel reads weights past a layer's forward: an adapter would be left out."""
    monkeypatch.setattr(kernels, "_slices", None)
    moe, x = _moe(), torch.randn(13, 16)
    _, weights, chosen = moe.router(x)

    def run(experts: torch.nn.ModuleList) -> None:
        run_experts(experts, x, weights=weights, chosen=chosen, kernel="grouped")

    run(moe.experts)  # slices are not called
    moe.experts[-1].down_proj = torch.nn.Sequential(moe.experts[-1].down_proj)
    with pytest.raises(TypeError, match="not callable"):
        run(moe.experts)
    moe = _moe()
    moe.experts[2].up_proj.to("meta")  # as an offloaded layer is outside its forward
    with pytest.raises(TypeError, match="not callable"):
        run(moe.experts)
    with pytest.raises(TypeError, match="not callable"):
        run(MoE(16, 6, num_experts=EXPERTS, top_k=2).experts)  # 24 bytes a row
