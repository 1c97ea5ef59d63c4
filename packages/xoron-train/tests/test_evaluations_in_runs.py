"""Proves that a recipe's evaluations are checked before a run, judge the model at the end or on the
way without moving its training, and fail the run where they are required."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from xoron_core.cli import run as xoron
from xoron_core.errors import ConfigError, UsageError, XoronError
from xoron_train import train
from xoron_train.metrics import read_metrics
from xoron_train.recipe import Recipe, load_recipe

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}
NOISY = {"use": "standin-noisy", "source": "grids", "split": "unseen", "samples": 3}


@pytest.fixture
def data(recipe_data: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        grids = {"kind": "dataset", "path": "standin-grids", "options": {"size": 12}}
        keys = {"mixture": {"grids": grids}, "sequence_length": 96, "final_eval_batches": 2}
        return recipe_data(**{**keys, **changes})

    return make


@pytest.fixture
def model(new_model: Callable[..., Path]) -> Path:
    return new_model(dropout=0.1, grid=GRID)


def test_results_are_recorded_and_training_does_not_notice(
    data: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    entries = {
        "often": {**NOISY, "every": True, "passes": False},  # reported, not required
        "last": {**NOISY, "split": "train", "samples": 99},
    }
    judged = Recipe.parse(data(eval_every=2, evaluations=entries))
    found = train(judged, tmp_path / "judged", model=model, quiet=True).evaluation["evaluations"]
    plain = Recipe.parse(data(eval_every=2))
    train(plain, tmp_path / "plain", model=model, quiet=True)
    said = {"result": 0.25, "training": False, "gradients": False}
    assert found["often"] == {**said, "samples": 3, "first": "unseen-0", "passed": False}
    assert found["last"] == {**said, "samples": 12, "first": "train-0", "passed": True}
    records = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("judged", "plain")]
    names = [list(r.get("evaluations", {})) for r in records[0] if r["kind"] == "eval"]
    assert names == [["often"], ["often"], ["often", "last"]]
    for with_, without in zip(*records, strict=True):
        assert with_["loss"] == without["loss"]


def test_evaluations_alone_make_a_record(
    data: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse(data(eval_fraction=0.0, evaluations={"e": NOISY}))
    evaluation = train(recipe, tmp_path / "run", model=model, quiet=True).evaluation
    assert evaluation.keys() == {"kind", "step", "evaluations"}


@pytest.mark.parametrize("passes", [False, None])
def test_a_required_one_that_does_not_pass_fails_the_run_but_keeps_the_model(
    data: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    passes: bool | None,
) -> None:
    entry = {**NOISY, "required": True, "passes": passes}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data(evaluations={"sees": entry})))
    run = tmp_path / "run"
    arguments = ["train", str(path), "--model", str(model), "-o", str(run)]
    assert xoron(arguments) == 1
    message = capsys.readouterr().err
    assert "model is trained and saved, but required evaluations did not pass: sees: {" in message
    assert '"result": 0.25' in message
    assert "Traceback" not in message
    assert (run / "model/config.json").is_file()
    entry["passes"] = True
    path.write_text(yaml.safe_dump(data(evaluations={"sees": entry})))
    assert xoron([*arguments, "--resume"]) == 0  # evaluations may change: they only observe
    assert "sees: result 0.2500" in capsys.readouterr().out


def test_what_is_no_plain_data_is_named(
    data: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import standin_media

    monkeypatch.setattr(standin_media.Noisy, "run", lambda *_: {"loss": float("nan")})
    recipe = Recipe.parse(data(evaluations={"sees": NOISY}))
    with pytest.raises(XoronError, match=r"evaluations\.sees: Noisy returned what is no plain"):
        train(recipe, tmp_path / "run", model=model, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use": "standin-nosy"}, r"r\.yaml:{}: evaluations\.sees\.use: unknown evaluation .*Did"),
        ({"use": None}, r"r\.yaml:{}: evaluations\.sees needs use: NAME"),
        ({"every": 3}, r"evaluations\.sees needs use: NAME .* every: 3"),
        ({"sample": 3}, r"r\.yaml:\d+: unknown key 'sample'. Did you mean 'samples'"),
        ({"samples": 0}, r"r\.yaml:\d+: 'samples': .*greater than or equal to 1"),
        (
            {"source": "grid"},
            r"sees\.source: no conversations .* Did you mean 'grids'",
        ),
    ],
)
def test_wrong_entries_are_refused_with_their_line(
    data: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "r.yaml"
    written = yaml.safe_dump(data(evaluations={"sees": {**NOISY, **change}}), sort_keys=False)
    path.write_text(written)
    line = 1 + next(n for n, text in enumerate(written.splitlines()) if text.startswith("    use:"))
    with pytest.raises((ConfigError, UsageError), match=message.replace("{}", str(line))):
        load_recipe(str(path))


def test_a_loaded_recipe_is_complete_and_reads_back(
    data: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data(evaluations={"sees": NOISY}, golden=["gold.jsonl"])))
    recipe = load_recipe(str(path))
    assert recipe.evaluations["sees"]["batch_size"] == 32
    assert Path(recipe.golden[0]).is_absolute()
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.data()))))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"golden": ["gold.txt"]}, r"golden: 'gold.txt' is neither a file .* \(grids\)"),
        ({"golden": ["grid:unseen"]}, "neither a file .*Did you mean 'grids'"),
        ({"budgets": {"a.projector": 0}}, "budgets"),
        ({"budgets": {"a.projector": "some"}}, "budgets"),
        (
            {"budgets": {"a.projector": 1}, "mixture": {"w": {"kind": "text", "path": "p"}}},
            "budgets is about conversations, and the mixture holds none",
        ),
        (
            {"mixture": {"w": {"kind": "dataset", "path": "p", "field": "x"}}},
            "takes no field; its keys are kind, options, path, weight",
        ),
    ],
)
def test_keys_about_conversations_are_checked(
    data: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(data(**change))
