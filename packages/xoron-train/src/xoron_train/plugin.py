"""What xoron-train contributes: the `train` command and its recipes. Imports nothing heavy."""

from __future__ import annotations

from types import ModuleType

from xoron_core.descriptors import Command
from xoron_core.hookspecs import hookimpl
from xoron_train import hookspecs
from xoron_train.hookspecs import RecipeFile

xoron_api = 1


@hookimpl
def xoron_hookspecs() -> list[ModuleType]:
    return [hookspecs]


@hookimpl
def xoron_commands() -> list[Command]:
    return [Command("train", "xoron_train.cli:train", "Train a model folder with a recipe.")]


@hookimpl
def xoron_recipes() -> list[RecipeFile]:
    return [
        RecipeFile(
            "text-tiny",
            "xoron_train:presets/text-tiny.yaml",
            "Byte-level text from the Python standard library's own sources; minutes on two cores.",
        )
    ]
