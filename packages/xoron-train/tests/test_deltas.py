"""Proves that a run which trains slots leaves them as a delta that makes the trained model of its
base, wherever that lies, and of no other; and that its checkpoints share what does not change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xoron_core.api import load
from xoron_core.deltas import read_delta
from xoron_core.errors import ConfigError, FolderError
from xoron_train import train
from xoron_train.recipe import Recipe, load_recipe

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}
TALKS = {"grids": {"kind": "dataset", "path": "standin-grids", "options": {"size": 24}}}


@pytest.fixture
def align(new_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe that trains the connector alone; decay would move what is frozen."""

    def make(**changes: Any) -> Recipe:
        common = {"mixture": TALKS, "sequence_length": 64, "weight_decay": 0.5}
        chosen = {"train": ["grid.projector"], "save_delta": True}
        return new_recipe(**{**common, **chosen, **changes})

    return make


@pytest.fixture
def base(new_model: Callable[..., Path]) -> Path:
    return new_model(grid=GRID)


def states(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load(folder, **options)[0].state_dict()


def different(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def test_the_connector_over_its_base_is_the_trained_model(
    base: Path, align: Callable[..., Recipe], tmp_path: Path, new_model: Callable[..., Path]
) -> None:
    result = train(align(max_steps=50), tmp_path / "run", model=base, quiet=True)
    connector = tmp_path / "run/connector"
    moved = different(states(base), states(result.model_folder))
    assert moved == {"slots.grid__projector.layers.weight", "slots.grid__projector.layers.bias"}
    record = read_delta(connector).record
    assert set(record.slots) == {"grid.projector"}
    assert set(record.base.slots) == {"backbone", "grid.encoder"}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere)
    whole = states(elsewhere, deltas=[connector])
    assert different(whole, states(result.model_folder)) == set()
    other = new_model(grid=GRID, dropout=0.3)  # the same weights: dropout has none
    assert different(states(other, deltas=[connector]), whole) == set()
    wider = new_model(grid=GRID, hidden_size=24)
    with pytest.raises(FolderError, match="another base: slot 'backbone' is sha256:"):
        load(wider, deltas=[connector])


def test_a_base_in_bf16_trained_in_fp32_is_still_the_base(
    base: Path, align: Callable[..., Recipe], tmp_path: Path
) -> None:
    from xoron_core.api import save

    half = tmp_path / "half"
    save(*load(base, dtype=torch.bfloat16), half)
    result = train(align(precision="fp32"), tmp_path / "run", model=half, quiet=True)
    trained = states(result.model_folder)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    whole = states(half, deltas=[tmp_path / "run/connector"], dtype=torch.float32)
    assert different(whole, trained) == set()
    with pytest.raises(FolderError, match="another base"):
        load(base, deltas=[tmp_path / "run/connector"])


@pytest.mark.parametrize("experts", [0, 2])
def test_a_killed_run_with_shared_files_goes_on_bit_for_bit(
    new_model: Callable[..., Path], align: Callable[..., Recipe], tmp_path: Path, experts: int
) -> None:
    model = new_model(grid=GRID, num_experts=experts, dropout=0.1)
    recipe = align(max_steps=8, save_every=2, keep_checkpoints=4)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expected = train(recipe, straight, model=model, quiet=True)
    checkpoints = sorted((straight / "checkpoints").iterdir())
    backbones, encoders = (
        {(c / f"slots/{slot}-00001.safetensors").stat().st_ino for c in checkpoints}
        for slot in ("backbone", "grid.encoder")
    )
    # The stand-in's experts move their selection bias at every step, frozen or not.
    assert len(backbones) == (4 if experts else 1)
    assert len(encoders) == 1
    shutil.copytree(straight, broken)
    for name in ("model", "connector", "checkpoints/step-00000006", "checkpoints/step-00000008"):
        shutil.rmtree(broken / name)
    resumed = train(recipe, broken, resume=True, quiet=True)
    assert resumed.evaluation == expected.evaluation
    assert different(states(broken / "model"), states(straight / "model")) == set()
    for file in ("connector/delta.safetensors", "connector/delta.json"):
        assert (broken / file).read_bytes() == (straight / file).read_bytes()


def test_a_file_system_without_links_gets_copies(
    base: Path, align: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", link)
    train(align(save_every=2), tmp_path / "run", model=base, quiet=True)
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    one, two = (folder / "slots/backbone-00001.safetensors" for folder in folders)
    assert one.stat().st_ino != two.stat().st_ino
    assert one.read_bytes() == two.read_bytes()
    assert different(states(folders[-1]), states(tmp_path / "run/model")) == set()


def test_a_delta_of_a_part_of_a_slot_is_refused_before_the_run(
    base: Path, align: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = align(train=["slots.grid__projector.layers.bias"])
    with pytest.raises(
        ConfigError, match=r"selects 1 of the 2 parameters of slot 'grid.projector'"
    ):
        train(recipe, tmp_path / "run", model=base, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["align", "sft"])
def test_shipped_stages_ask_for_data(name: str, tmp_path: Path) -> None:
    expected = r"mixture\.images\.path is not set; .*--set mixture\.images\.path=PATH"
    with pytest.raises(ConfigError, match=expected):
        load_recipe(name)
    recipe = load_recipe(name, [f"mixture.images.path={tmp_path}/talks.jsonl"])
    assert recipe.train == ("image.projector",)
    if name == "align":
        assert recipe.save_delta
        assert recipe.lora is None
    else:
        assert recipe.lora is not None
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (16, 32, ())
