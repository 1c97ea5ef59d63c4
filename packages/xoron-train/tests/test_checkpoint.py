"""Proves that a checkpoint is whole or not there, that a failed write keeps the old one, and that a
resume refuses what would make it another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xoron_core.api import load
from xoron_core.errors import ConfigError, DataError, FolderError, TokenSpaceError, UsageError
from xoron_train import checkpoint as checkpoints
from xoron_train import train
from xoron_train.metrics import read_metrics
from xoron_train.recipe import Recipe, load_recipe


@pytest.fixture
def run(model_folder: Path, new_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path / "run"
    recipe = new_recipe(save_every=2, keep_checkpoints=3)
    train(recipe, folder, model=model_folder, quiet=True)
    return folder


def steps(run: Path) -> list[int]:
    folder = checkpoints.checkpoints_folder(run)
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def cut_back(run: Path, *later: int) -> None:
    """Makes a run look as if it had been killed before the given checkpoints."""
    for step in later:
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    shutil.rmtree(run / "model")


def test_a_checkpoint_is_a_model_folder_of_safetensors(run: Path) -> None:
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 6
    model, processor = load(found.folder)
    final, _ = load(run / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, final.state_dict()[name])
    assert processor.tokenizer is not None
    names = {name.removeprefix("slots.") for name in found.optimizer()}
    assert "backbone.model.head.weight/exp_avg_sq" in names
    suffixes = {path.suffix for path in found.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jinja", ".md", ".safetensors"}


@pytest.mark.parametrize("damage", ["no state", "cut state", "cut file", "no file"])
def test_an_incomplete_checkpoint_is_passed_over(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run / "checkpoints/step-00000006"
    state, weights = newest / "trainer/state.json", newest / "slots/backbone-00001.safetensors"
    if damage == "no state":
        state.unlink()
    elif damage == "cut state":
        state.write_text(state.read_text()[:100])
    elif damage == "cut file":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.unlink()
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 4
    assert "step-00000006 is incomplete" in caplog.text


def test_a_replacement_killed_half_way_is_finished(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "step-00000006").rename(folder / ".step-00000006.old")
    (folder / ".step-00000008.partial").mkdir()
    found = checkpoints.latest(run)
    assert found is not None
    assert found.step == 6


def test_only_the_newest_are_kept_and_leftovers_go(run: Path) -> None:
    assert steps(run) == [2, 4, 6]
    (run / "checkpoints/.step-00000008.partial").mkdir()
    checkpoints.prune(run, 2)
    assert steps(run) == [4, 6]


def test_a_full_disk_leaves_the_old_checkpoint(
    model_folder: Path,
    new_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = checkpoints.write_tensors

    def write_tensors(path: Path, *args: Any, **kwargs: Any) -> None:
        if "step-00000004" in str(path) and path.name == "data.safetensors":
            raise OSError(28, "No space left on device")
        original(path, *args, **kwargs)

    recipe = new_recipe(save_every=2, keep_checkpoints=1)
    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    with pytest.raises(FolderError, match=r"step-00000004: could not be written \(No space left"):
        train(recipe, tmp_path / "run", model=model_folder, quiet=True)
    assert steps(tmp_path / "run") == [2]
    monkeypatch.undo()
    # And the run goes on from there to what it would have been.
    resumed = train(recipe, tmp_path / "run", resume=True, quiet=True)
    straight = train(recipe, tmp_path / "straight", model=model_folder, quiet=True)
    assert resumed.evaluation == straight.evaluation


def test_resuming_a_finished_run_changes_nothing(
    run: Path, new_recipe: Callable[..., Recipe]
) -> None:
    before = read_metrics(run / "metrics.jsonl")
    train(new_recipe(save_every=2), run, resume=True, quiet=True)
    assert read_metrics(run / "metrics.jsonl") == before


def test_a_used_folder_needs_resume_and_a_foreign_one_is_refused(
    run: Path, model_folder: Path, new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is not empty; go on with its run by --resume"):
        train(new_recipe(), run, model=model_folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is no run's folder"):
        train(new_recipe(), tmp_path / "other", model=model_folder, resume=True)
    with pytest.raises(UsageError, match="--model must name a model folder"):
        train(new_recipe(), tmp_path / "new", resume=True)


def test_another_recipe_is_refused_by_the_keys_that_differ(
    run: Path, new_recipe: Callable[..., Recipe], corpus: Path
) -> None:
    mixture = {
        "words": {"kind": "files", "path": str(corpus), "pattern": "*.txt", "exclude": ["1*"]}
    }
    other = new_recipe(learning_rate=0.02, max_steps=9, mixture=mixture, log_every=5)
    with pytest.raises(ConfigError) as caught:
        train(other, run, resume=True)
    message = str(caught.value)
    for part in ("learning_rate (0.01 -> 0.02)", "max_steps (6 -> 9)", "mixture.words.exclude"):
        assert part in message
    assert "log_every" not in message
    with pytest.raises(ConfigError, match=r"takes 2 rows, now .* is 4"):
        train(new_recipe(batch_size=4), run, resume=True)


def test_the_written_recipe_is_the_resolved_one_and_can_be_resumed_with(
    run: Path, new_recipe: Callable[..., Recipe]
) -> None:
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert recipe == new_recipe(save_every=2, keep_checkpoints=3)
    train(recipe, run, resume=True, quiet=True)


def test_another_token_space_is_refused_naming_both(
    run: Path, new_model: Callable[..., Path], new_recipe: Callable[..., Recipe]
) -> None:
    other = new_model(tokens={"groups": ["control"]})
    hashes = [
        json.loads((folder / "config.json").read_text())["token_space_hash"]
        for folder in (other, run / "model")
    ]
    assert hashes[0] != hashes[1]
    with pytest.raises(TokenSpaceError) as caught:
        train(new_recipe(save_every=2), run, model=other, resume=True)
    assert all(value in str(caught.value) for value in hashes)


def test_changed_data_is_refused(
    model_folder: Path, new_recipe: Callable[..., Recipe], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    mixture = {"words": {"kind": "files", "path": str(tmp_path / "data"), "pattern": "*.txt"}}
    recipe = new_recipe(mixture=mixture, save_every=2)
    train(recipe, tmp_path / "run", model=model_folder, quiet=True)
    cut_back(tmp_path / "run", 6)
    (tmp_path / "data/more.txt").write_text("more")
    with pytest.raises(DataError, match=r"mixture\.words: its documents have changed"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)


def test_another_number_of_threads_is_said(
    run: Path,
    new_recipe: Callable[..., Recipe],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_back(run, 6)
    threads = torch.get_num_threads()
    train(new_recipe(save_every=2), run, resume=True, quiet=True)
    assert "written with" not in caplog.text
    cut_back(run, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(new_recipe(save_every=2), run, resume=True, quiet=True)
    assert f"written with threads {threads}, this process has {threads + 1}" in caplog.text


def test_nothing_is_written_before_all_is_found_good(
    model_folder: Path, new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    mixture = {"none": {"kind": "files", "path": str(tmp_path / "empty")}}
    with pytest.raises(DataError):
        train(new_recipe(mixture=mixture), tmp_path / "run", model=model_folder)
    with pytest.raises(FolderError, match="there is no such folder"):
        train(new_recipe(), tmp_path / "run", model=tmp_path / "absent")
    with pytest.raises(DataError, match="holds out no document"):
        train(new_recipe(eval_fraction=1e-9), tmp_path / "run", model=model_folder)
    assert not (tmp_path / "run").exists()
