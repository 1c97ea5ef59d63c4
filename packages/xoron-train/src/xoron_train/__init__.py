"""Staged training of xoron models: recipes, data, losses, exact resume.

    from xoron_train import load_recipe, train

    result = train(load_recipe("text-tiny", ["max_steps=200"]), "run", model="model-folder")

Importing this package imports nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xoron_train.lora import load_adapter
    from xoron_train.recipe import Recipe, load_recipe
    from xoron_train.run import Result, train

_LAZY = {
    "Recipe": "xoron_train.recipe",
    "Result": "xoron_train.run",
    "load_adapter": "xoron_train.lora",
    "load_recipe": "xoron_train.recipe",
    "train": "xoron_train.run",
}

__all__ = ["Recipe", "Result", "load_adapter", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'xoron_train' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
