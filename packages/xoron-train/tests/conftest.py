"""Installs the stand-in plug-in for these tests, also for the processes they start."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from xoron_core.api import compose, save
from xoron_core.plugins import registry
from xoron_train.recipe import Recipe

STANDIN = Path(__file__).parent / "standin"
WORDS = ("alpha", "beta", "gamma", "delta", "import", "return", "\u00e4\u00f6\u00fc", "x = 1\n")


@pytest.fixture(scope="session")
def _distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    info = folder / "xoron_standin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xoron-standin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[xoron]\nstandin = standin_plugin\n")
    return folder


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """What a command sets up for its messages ends with the test that called it."""
    logger = logging.getLogger("xoron")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers = handlers


@pytest.fixture(autouse=True, scope="module")
def standin(_distribution: Path) -> Iterator[None]:
    """Puts the plug-in on the path of this process and of its children, and takes it off again."""
    added = [str(_distribution), str(STANDIN)]
    before = os.environ.get("PYTHONPATH")
    sys.path[:0] = added
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, *([before] if before else [])])
    registry.cache_clear()
    yield
    for path in added:
        sys.path.remove(path)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    registry.cache_clear()


@pytest.fixture(scope="module")
def new_model(tmp_path_factory: pytest.TempPathFactory, standin: None) -> Callable[..., Path]:
    """Composes a model folder of the stand-in parts, from config keys of its backbone.

    With `grid`, slots of that modality come to it.
    """

    def make(
        tokens: dict[str, Any] | None = None, grid: dict[str, Any] | None = None, **config: Any
    ) -> Path:
        composition = {
            "name": "standin",
            "tokenizer": {"use": "standin-byte"},
            "backbone": {"use": "standin-lm", **config},
            "tokens": tokens or {},
            **({} if grid is None else {"grid": grid}),
        }
        folder = tmp_path_factory.mktemp("model") / "m"
        save(*compose(composition), folder)
        return folder

    return make


@pytest.fixture(scope="module")
def model_folder(new_model: Callable[..., Path]) -> Path:
    """A model folder whose training draws random numbers."""
    return new_model(dropout=0.1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty text files, the same every time."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = [WORDS[(number * k + k * k) % len(WORDS)] for k in range(5 + 7 * (number % 9))]
        (folder / f"{number:02d}.txt").write_text(" ".join(words) + f" {number}\n", "utf-8")
    return folder


@pytest.fixture
def recipe_data(corpus: Path) -> Callable[..., dict[str, Any]]:
    """Data of a recipe that runs in a second, with changes."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "test",
            "mixture": {"words": {"kind": "files", "path": str(corpus), "pattern": "*.txt"}},
            "eval_fraction": 0.2,
            "sequence_length": 32,
            "batch_size": 2,
            "max_steps": 6,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "log_every": 1,
            "tensorboard": False,
            **changes,
        }

    return make


@pytest.fixture
def new_recipe(recipe_data: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """The same, as a recipe."""
    return lambda **changes: Recipe.parse(recipe_data(**changes))


@pytest.fixture
def recipe_file(recipe_data: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a YAML file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_data(**changes)), encoding="utf-8")
        return path

    return write
