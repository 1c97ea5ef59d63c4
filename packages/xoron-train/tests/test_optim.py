"""Proves the values of the schedule, what weight decay spares, what Muon is for and that beside
AdamW it steps as alone, and the optimizer's state by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from xoron_core.errors import ConfigError, FolderError
from xoron_train.optim import (
    build_optimizer,
    decayed_names,
    learning_rate,
    load_optimizer_tensors,
    muon_names,
    optimizer_tensors,
    set_learning_rate,
)
from xoron_train.recipe import Recipe


def test_the_schedule_is_linear_then_cosine(new_recipe: Callable[..., Recipe]) -> None:
    recipe = new_recipe(max_steps=104, warmup_steps=4, learning_rate=1.0, min_lr_ratio=0.2)
    assert [learning_rate(step, recipe) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, recipe) == 1.0
    # Half way through the 99 steps of decay, between the peak and the low end.
    assert learning_rate(4 + 33, recipe) == pytest.approx(0.2 + 0.8 * 0.75)
    assert learning_rate(103, recipe) == pytest.approx(0.2)
    rates = [learning_rate(step, recipe) for step in range(4, 104)]
    assert rates == sorted(rates, reverse=True)


def test_the_warm_up_may_be_a_share_of_the_steps(new_recipe: Callable[..., Recipe]) -> None:
    assert new_recipe(warmup_steps=None, warmup_ratio=0.1, max_steps=50).num_warmup_steps == 5
    assert learning_rate(0, new_recipe(warmup_steps=0, max_steps=1)) == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_ratio": 0.1}, "not both"),
        ({"warmup_steps": 6}, "must end before max_steps"),
        ({"betas": [0.9, 1.0]}, "betas must lie in"),
        ({"loss_weights": {"text": -1.0}}, "must not be negative"),
        ({"learning_rate": "fast"}, "'learning_rate'"),
        ({"max_steps": 0}, "'max_steps'"),
    ],
)
def test_rates_that_make_no_sense_are_refused(
    new_recipe: Callable[..., Recipe], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        new_recipe(**changes)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.bias = nn.Parameter(torch.randn(2, 2))


def test_decay_spares_norms_biases_embeddings_and_what_is_tied_to_them() -> None:
    assert decayed_names(Model()) == {"inner.weight", "experts"}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_a_restored_optimizer_steps_bit_for_bit(new_recipe: Callable[..., Recipe]) -> None:
    torch.manual_seed(0)
    one, other = Model(), Model()
    optimizers = []
    for model in (one, other):
        trained = dict(model.named_parameters())
        optimizers.append(build_optimizer(model, trained, new_recipe()))
    for seed in range(3):
        step(one, optimizers[0], seed)
    tensors = optimizer_tensors(optimizers[0], dict(one.named_parameters()))
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    assert {name.rpartition("/")[0] for name in state} == dict(one.named_parameters()).keys()
    other.load_state_dict(one.state_dict())
    # Names, not places in a list: the order of the parameters may differ.
    backwards = dict(reversed(list(other.named_parameters())))
    load_optimizer_tensors(optimizers[1], backwards, state, where="f")
    for model, optimizer in zip((one, other), optimizers, strict=True):
        step(model, optimizer, 9)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_optimizer_state_of_another_model_is_refused(
    new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = Model()
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(model, trained, new_recipe())
    step(model, optimizer, 0)
    state = optimizer_tensors(optimizer, trained)
    with pytest.raises(FolderError, match=r"optimizer state of 'x', which this recipe"):
        load_optimizer_tensors(optimizer, trained, {"x/step": torch.zeros(())}, where="f")
    wrong = {**state, "experts/exp_avg": torch.zeros(3, 3)}
    with pytest.raises(FolderError, match=r"experts/exp_avg has shape \(3, 3\).* \(2, 4, 4\)"):
        load_optimizer_tensors(optimizer, trained, wrong, where="f")
    fewer = {name: value for name, value in state.items() if not name.startswith("experts")}
    with pytest.raises(FolderError, match="holds no optimizer state of experts"):
        load_optimizer_tensors(optimizer, trained, fewer, where="f")


def test_the_decay_of_one_step_is_exact(new_recipe: Callable[..., Recipe]) -> None:
    model = Model()
    recipe = new_recipe(weight_decay=0.5, learning_rate=0.1)
    optimizer = build_optimizer(model, dict(model.named_parameters()), recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        shrink = 1 - 0.1 * 0.5 if name in ("inner.weight", "experts") else 1.0
        torch.testing.assert_close(value, before[name] * shrink, rtol=1e-6, atol=0)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_muon_and_adamw_step_beside_each_other_as_they_do_alone(
    new_recipe: Callable[..., Recipe],
) -> None:
    recipe = new_recipe(
        muon={"learning_rate": 0.05, "momentum": 0.9}, weight_decay=0.1, max_steps=9, warmup_steps=3
    )
    torch.manual_seed(0)
    model, alone = Model(), Model()
    alone.load_state_dict(model.state_dict())
    assert muon_names(model) == {"inner.weight"}  # not experts of three axes, not what is tied
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(model, trained, recipe)
    muon = torch.optim.Muon([alone.inner.weight], lr=0.05, weight_decay=0.1, momentum=0.9)
    options = {"lr": 0.01, "betas": recipe.betas, "eps": recipe.epsilon}
    spared = [alone.norm.weight, alone.norm.bias, alone.inner.bias, alone.embedding.weight]
    adamw = torch.optim.AdamW(
        [
            {"params": [alone.experts], "weight_decay": 0.1},
            {"params": [*spared, alone.bias], "weight_decay": 0.0},
        ],
        **options,
    )
    for step in range(4):
        assert set_learning_rate(optimizer, step, recipe) == learning_rate(step, recipe)
        share = learning_rate(step, recipe) / recipe.learning_rate
        for one, peak in ((muon, 0.05), (adamw, 0.01)):
            for group in one.param_groups:
                group["lr"] = peak * share
        _step(model, optimizer, step)
        torch.manual_seed(step)
        for parameter in alone.parameters():
            parameter.grad = torch.randn_like(parameter)
        muon.step()
        adamw.step()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    # A copy that takes over state and weights goes on bit for bit.
    other = Model()
    other.load_state_dict(model.state_dict())
    named = dict(other.named_parameters())
    continued = build_optimizer(other, named, recipe)
    tensors = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer, trained).items()}
    load_optimizer_tensors(continued, named, tensors, where="x")
    for one, kept in ((model, optimizer), (other, continued)):
        set_learning_rate(kept, 4, recipe)
        _step(one, kept, 4)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_without_a_matrix_inside_the_model_is_refused(
    new_recipe: Callable[..., Recipe],
) -> None:
    model, recipe = Model(), new_recipe(muon={})
    trained = dict(model.named_parameters())
    inside = {"inner.weight": trained.pop("inner.weight")}
    with pytest.raises(ConfigError, match="muon: none of the 6 trained parameters is a matrix"):
        build_optimizer(model, trained, recipe)
    assert isinstance(build_optimizer(model, inside, recipe), torch.optim.Muon)


def test_muon_leaves_an_untied_head_to_adamw(new_model: Callable[..., Path]) -> None:
    from xoron_core.api import load

    model, _ = load(new_model())
    names = muon_names(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not embedding.weight
    ids = {id(head.weight), id(embedding.weight)}
    named = dict(model.named_parameters())
    assert names
    assert not ids & {id(named[name]) for name in names}
    assert decayed_names(model) - names == {n for n, p in named.items() if p is head.weight}
