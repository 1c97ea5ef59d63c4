"""The hook surface of xoron-train, and the descriptor that it exchanges. Light: no torch.

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


@hookspec
def xoron_recipes() -> list[RecipeFile]:  # type: ignore[empty-body]
    """Training stages that `xoron train` can name."""
