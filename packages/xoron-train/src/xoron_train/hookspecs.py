"""The hook surface of xoron-train, and the descriptors that it exchanges. Light: no torch.

Another package contributes a training stage by implementing

    @hookimpl
    def xoron_recipes():
        return [RecipeFile("my-stage", "my_package:presets/my-stage.yaml", "What it trains.")]

beside its other hooks; `xoron train my-stage` then finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xoron_core.hookspecs import hookspec


@dataclass(frozen=True)
class RecipeFile:
    """A recipe shipped as a package resource.

    Attributes:
        name: what `xoron train` takes, e.g. `text-tiny`.
        resource: `package:path/inside/it.yaml`.
        summary: one line for lists.
    """

    name: str
    resource: str
    summary: str


@dataclass(frozen=True)
class Dataset:
    """Conversations that a package makes or brings.

    Attributes:
        name: what a recipe's source of kind `dataset` names, e.g. `vision-digits`.
        factory: `package.module:function`, called as `function(split, **options)`; returns
            `xoron_train.conversation.Conversations`, or raises `ConfigError` for an unknown split.
        splits: their names, `train` first.
        summary: one line for lists.
    """

    name: str
    factory: str
    splits: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class EvaluationType:
    """An evaluation that a recipe can name.

    Attributes:
        name: e.g. `seeing`.
        factory: `package.module:Class`, an `xoron_train.evaluations.base.Evaluation`.
        config: `package.module:Class`, its `EvaluationConfig`.
        summary: one line for lists.
    """

    name: str
    factory: str
    config: str
    summary: str


@hookspec
def xoron_recipes() -> list[RecipeFile]:  # type: ignore[empty-body]
    """Training stages that `xoron train` can name."""


@hookspec
def xoron_datasets() -> list[Dataset]:  # type: ignore[empty-body]
    """Conversations that a recipe's mixture can name."""


@hookspec
def xoron_evaluations() -> list[EvaluationType]:  # type: ignore[empty-body]
    """Evaluations that a recipe can name."""
