"""Proves that training on conversations with media keeps what training on text promises: the same
gradient however rows are batched, exact resume, and the same result on two processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from xoron_core.api import load
from xoron_train import train
from xoron_train.data.batches import Window
from xoron_train.data.feed import Feed
from xoron_train.data.talks import Talk
from xoron_train.metrics import read_metrics
from xoron_train.recipe import Recipe

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}
_TIMES = ("tokens_per_second", "elapsed_seconds", "items_per_second")


@pytest.fixture
def mixed(corpus: Path, recipe_data: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """A recipe of text and conversations."""

    def make(**changes: Any) -> Recipe:
        words = {"kind": "files", "path": str(corpus), "pattern": "*.txt"}
        grids = {"kind": "dataset", "path": "standin-grids", "options": {"size": 30}}
        keys = {"sequence_length": 96, "shuffle_rows": 5, "max_steps": 8, "final_eval_batches": 3}
        mixture = {"words": words, "grids": grids}
        return Recipe.parse(recipe_data(**{"mixture": mixture, **keys, **changes}))

    return make


def records(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl")
    return [{key: record[key] for key in record if key not in _TIMES} for record in found]


def windows(recipe: Recipe, folder: Path) -> list[Window]:
    """The rows of a recipe's first steps, in one process."""
    model, processor = load(folder)
    feed = Feed(recipe, model, processor=processor, accelerator=Accelerator())
    return [feed.window(step) for step in range(recipe.max_steps)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder)[0].state_dict()


def test_micro_batches_give_the_gradient_of_the_large_batch(
    monkeypatch: pytest.MonkeyPatch,
    new_model: Callable[..., Path],
    mixed: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    model = new_model(dropout=0.0, grid=GRID)
    seen: list[torch.Tensor] = []

    def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            seen.extend(parameter.grad.clone() for parameter in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    common = {"max_steps": 1, "warmup_steps": 0, "eval_fraction": 0.0, "max_grad_norm": None}
    found = {}
    for size in (12, 3, 1):
        seen.clear()
        sizes = {"batch_size": size, "gradient_accumulation_steps": 12 // size}
        train(mixed(**sizes, **common), tmp_path / str(size), model=model, quiet=True)
        found[size] = list(seen)
    assert sum(float(g.abs().sum()) for g in found[12]) > 1.0
    for size in (3, 1):
        for large, small in zip(found[12], found[size], strict=True):
            torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def test_resumed_is_uninterrupted_bit_for_bit(
    new_model: Callable[..., Path], mixed: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = new_model(dropout=0.1, grid=GRID)
    recipe = mixed(
        save_every=3,
        eval_every=4,
        gradient_accumulation_steps=2,
        keep_checkpoints=9,
        budgets={"grid.projector": "random"},
        length_group_steps=4,
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(recipe, straight, model=model, quiet=True)
    shutil.copytree(straight, broken)
    for step in (6, 8):
        shutil.rmtree(broken / f"checkpoints/step-{step:08d}")
    shutil.rmtree(broken / "model")
    train(recipe, broken, resume=True, quiet=True)
    assert records(broken) == records(straight)
    trained = [record for record in records(straight) if record["kind"] == "train"]
    positions = [record["tokens"] for record in trained]
    assert positions == sorted(set(positions))
    expected = weights(straight / "model")
    start = weights(model)
    for name, tensor in weights(broken / "model").items():
        assert torch.equal(tensor, expected[name]), name
        assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def test_the_final_loss_by_budget_is_that_of_each_budget_alone(
    new_model: Callable[..., Path], mixed: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = new_model(dropout=0.0, grid=GRID)
    # A step too small to change a weight: all four judge one model.
    keys = {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "warmup_steps": 0}

    def judged(name: str, budget: Any) -> dict[str, Any]:
        recipe = mixed(**keys, budgets={"grid.projector": budget})
        return train(recipe, tmp_path / name, model=model, quiet=True).evaluation

    together = judged("random", "random")
    by_budget = together["budgets"]["grid.projector"]
    assert len(set(by_budget.values())) == 3
    for count, loss in by_budget.items():
        alone = judged(count, int(count))
        assert "budgets" not in alone
        assert alone["sources"]["grids"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert together["sources"]["grids"]["loss"] == by_budget["4"]


def test_records_tell_text_from_conversations(
    new_model: Callable[..., Path], mixed: Callable[..., Recipe], tmp_path: Path
) -> None:
    result = train(mixed(), tmp_path / "run", model=new_model(dropout=0.0, grid=GRID), quiet=True)
    final = result.evaluation
    words, grids = final["sources"]["words"], final["sources"]["grids"]
    assert final["tokens"] == words["tokens"] + grids["tokens"] > grids["tokens"] > 0
    assert final["bits_per_byte"] == words["bits_per_byte"] > 0
    assert grids["bits_per_byte"] is None
    for record in read_metrics(tmp_path / "run/metrics.jsonl")[:-1]:
        assert record["bits_per_byte"] is None  # the loss is of both at once
        assert record["items_per_second"]["grid"] > 0


@pytest.mark.slow
def test_two_processes_equal_one_though_one_has_no_media(
    new_model: Callable[..., Path], mixed: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = new_model(dropout=0.0, grid={**GRID, "encoder": {**GRID["encoder"], "freeze": True}})
    # Two rows per step, dealt by length: text, the longer one, falls to one process alone.
    keys = {"batch_size": 1, "final_eval_batches": None, "budgets": {"grid.projector": "random"}}
    with_media = [
        [any(isinstance(row, Talk) for row in rows) for rows in window.groups]
        for window in windows(mixed(**keys, gradient_accumulation_steps=2), model)
    ]
    assert [True, False] in with_media
    two, one = tmp_path / "two", tmp_path / "one"
    script, written = tmp_path / "main.py", tmp_path / "recipe.yaml"
    script.write_text("from xoron_core.cli import main\nmain()\n")
    written.write_text(yaml.safe_dump(mixed(**keys).data()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["train", str(written), "--model", str(model), "-o", str(two)]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train(mixed(**keys, gradient_accumulation_steps=2), one, model=model, quiet=True)
    pairs = list(zip(records(two), records(one), strict=True))
    assert len(pairs) == 9
    for record, expected in pairs:
        assert record["tokens"] == expected["tokens"]
        assert record["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        if record["kind"] == "train":
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
