"""Proves that recipes are found by name or path, resolve to absolute paths and survive writing, and
that the plug-in stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xoron_core.errors import ConfigError, UsageError
from xoron_core.plugins import registry
from xoron_train import catalog
from xoron_train.hookspecs import RecipeFile
from xoron_train.recipe import Recipe, differences, load_recipe, recipes


def test_every_shipped_recipe_loads_and_survives_writing(tmp_path: Path) -> None:
    assert "text-tiny" in recipes()
    data = {name: ["mixture.images.path=talks.jsonl"] for name in ("align", "sft")}
    data |= {name: ["mixture.media.path=talks.jsonl"] for name in ("rows", "rows-lora", "mixed")}
    data["mixed"].append("mixture.text.path=texts.jsonl")
    for name in recipes():
        recipe = load_recipe(name, data.get(name, ()))
        assert recipe.name == name
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe.data()))
        assert load_recipe(str(path)) == recipe


def test_local_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "name: x\nmax_steps: 1\nlearning_rate: 1.0\nmixture:\n"
        "  a: {kind: files, path: data}\n  b: {kind: hf, path: owner/name}\n"
        "  c: {kind: files, path: stdlib}\n"
    )
    mixture = load_recipe("r.yaml", ["mixture.a.weight=2.5"]).mixture
    assert mixture["a"].path == str(tmp_path / "data")
    assert (mixture["b"].path, mixture["c"].path) == ("owner/name", "stdlib")
    assert mixture["a"].weight == 2.5


def test_two_plugins_with_one_recipe_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice:
        @staticmethod
        def extra(hook: str) -> list[tuple[str, RecipeFile]]:
            assert hook == "xoron_recipes"
            return [(plugin, RecipeFile("r", "x:y", "")) for plugin in ("train", "other")]

    monkeypatch.setattr(catalog, "registry", Twice)
    with pytest.raises(UsageError, match="offered by the plug-ins 'train' and 'other'"):
        recipes()


def test_streams_need_an_end_for_their_evaluation() -> None:
    data = {
        "name": "x",
        "max_steps": 1,
        "learning_rate": 1.0,
        "mixture": {"a": {"kind": "jsonl", "path": "p", "streaming": True}},
    }
    with pytest.raises(ConfigError, match="set final_eval_batches"):
        Recipe.parse(data)
    assert Recipe.parse({**data, "final_eval_batches": 2}).final_eval_batches == 2


def test_differences_name_nested_keys_and_spare_what_only_observes() -> None:
    old = {"a": {"b": 1, "c": 2}, "log_every": 1, "batch_size": 2, "seed": 0}
    new = {"a": {"b": 1, "c": 3}, "log_every": 9, "batch_size": 4, "seed": 0, "x": 1}
    assert differences(old, new) == ["a.c (2 -> 3)", "x (None -> 1)"]
    assert set(old) - {"a"} <= set(Recipe.model_fields)


def test_the_plugin_is_available_and_imports_nothing_heavy() -> None:
    assert registry().plugin("train").state == "available"
    code = (
        "import sys, xoron_train, xoron_train.plugin as p; p.xoron_recipes(); p.xoron_commands();"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'typer', 'numpy', 'datasets')"
        " if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
