"""Proves that the size of micro-batches does not change the gradient, that frozen tensors stay bit
for bit, that losses are weighted globally, and that a loss that is not finite stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xoron_core.api import load
from xoron_core.components import LossTerm
from xoron_core.errors import ConfigError, XoronError
from xoron_train import train
from xoron_train.losses import check_counts, weighted
from xoron_train.recipe import Recipe
from xoron_train.selectors import apply_selectors


def gradients(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, model: Path, run: Path
) -> list[torch.Tensor]:
    """The gradients that one training step hands to the optimizer."""
    seen: list[torch.Tensor] = []

    def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            seen.extend(parameter.grad.clone() for parameter in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(recipe, run, model=model, quiet=True)
    return seen


def test_micro_batches_give_the_gradient_of_the_large_batch(
    monkeypatch: pytest.MonkeyPatch,
    new_model: Callable[..., Path],
    new_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    model = new_model(dropout=0.0)
    common = {"max_steps": 1, "warmup_steps": 0, "eval_fraction": 0.0, "max_grad_norm": None}
    runs = {
        size: gradients(
            monkeypatch,
            new_recipe(batch_size=size, gradient_accumulation_steps=12 // size, **common),
            model,
            tmp_path / str(size),
        )
        for size in (12, 3, 1)
    }
    assert sum(float(g.abs().sum()) for g in runs[12]) > 1.0
    for size in (3, 1):
        for large, small in zip(runs[12], runs[size], strict=True):
            torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def test_frozen_tensors_stay_bit_for_bit_under_weight_decay(
    new_model: Callable[..., Path], new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = new_model(dropout=0.0)
    recipe = new_recipe(freeze=["*.attention.*", "*.embedding.*"], weight_decay=0.5)
    result = train(recipe, tmp_path / "run", model=folder, quiet=True)
    before, after = load(folder)[0].state_dict(), load(result.model_folder)[0].state_dict()
    frozen = {name for name in before if ".attention." in name or ".embedding." in name}
    assert len(frozen) == 3
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name in frozen), name


def test_train_names_what_moves_and_overrides_the_composition(
    new_model: Callable[..., Path],
) -> None:
    model, _ = load(new_model(dropout=0.0))
    model.part("backbone").requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        apply_selectors(model)
    chosen = apply_selectors(model, train=["backbone"], freeze=["*.mlp.*"])
    every = {name for name, _ in model.named_parameters()}
    assert set(chosen) == {name for name in every if ".mlp." not in name} != every
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(chosen)


@pytest.mark.parametrize("key", ["train", "freeze"])
def test_a_selector_that_matches_nothing_is_an_error(
    new_model: Callable[..., Path], key: str
) -> None:
    model, _ = load(new_model(dropout=0.0))
    with pytest.raises(ConfigError, match=rf"{key}: 'bakbone' matches no slot.*'backbone'"):
        apply_selectors(model, **{key: ["bakbone"]})  # type: ignore[arg-type]


def test_losses_are_divided_by_global_counts_and_weighted() -> None:
    terms = {
        "text": LossTerm(torch.tensor(6.0), torch.tensor(3.0)),
        "image": LossTerm(torch.tensor(8.0), torch.tensor(2.0)),
        "absent": LossTerm(torch.tensor(0.0), torch.tensor(0.0)),
    }
    counts = {"text": 12.0, "image": 4.0, "absent": 0.0}
    assert float(weighted(terms, counts, {"image": 0.1})) == pytest.approx(6 / 12 + 0.1 * 8 / 4)


def test_a_count_that_lies_is_found() -> None:
    check_counts({"text": 5.0}, {"text": 5.0, "dummy": 0.0})
    with pytest.raises(XoronError, match=r"loss 'text': the model counted 5.0 .* 4.0 in them"):
        check_counts({"text": 5.0}, {"text": 4.0})
    with pytest.raises(XoronError, match="loss 'image'"):
        check_counts({}, {"image": 4.0})


def test_a_weight_for_an_unknown_loss_is_refused(
    model_folder: Path, new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no loss 'txt'\. Did you mean 'text'\?"):
        train(new_recipe(loss_weights={"txt": 2.0}), tmp_path / "r", model=model_folder, quiet=True)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    model_folder: Path,
    new_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xoron_core import losses

    original, calls = losses.text_loss, []

    def text_loss(*args: Any, **kwargs: Any) -> LossTerm:
        calls.append(1)
        term = original(*args, **kwargs)
        return term._replace(sum=term.sum * (float("nan") if len(calls) == 4 else 1.0))

    monkeypatch.setattr(losses, "text_loss", text_loss)
    recipe = new_recipe(eval_fraction=0.0, save_every=1)
    with pytest.raises(XoronError, match=r"step 4: the loss is nan"):
        train(recipe, tmp_path / "run", model=model_folder, quiet=True)
    steps = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000003"]


def test_recomputed_activations_change_nothing(
    model_folder: Path,
    new_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from standin_parts import StandInBackbone

    layer, calls = StandInBackbone._layer, {True: 0, False: 0}
    for wanted in (True, False):

        def counted(self: Any, *args: Any, wanted: bool = wanted) -> torch.Tensor:
            calls[wanted] += 1
            return layer(self, *args)

        monkeypatch.setattr(StandInBackbone, "_layer", counted)
        recipe = new_recipe(gradient_checkpointing=wanted, eval_fraction=0.0)
        train(recipe, tmp_path / str(wanted), model=model_folder, quiet=True)
    assert calls[True] == 2 * calls[False] > 0
    weights = [load(tmp_path / str(w) / "model")[0].state_dict() for w in (True, False)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_bf16_keeps_fp32_masters_and_comes_close_to_fp32(
    new_model: Callable[..., Path], new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from accelerate.state import AcceleratorState

    folder, losses = new_model(dropout=0.0), {}
    for precision in ("fp32", "bf16"):
        # accelerate keeps the first precision of a process, and a run has a process of its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        run = tmp_path / precision
        result = train(new_recipe(precision=precision), run, model=folder, quiet=True)
        losses[precision] = result.evaluation["loss"]
        weights = load(result.model_folder)[0].state_dict().values()
        assert {tensor.dtype for tensor in weights} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
