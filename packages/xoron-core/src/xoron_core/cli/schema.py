"""`xoron schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from xoron_core.composer.composition import Composition
from xoron_core.descriptors import KINDS, resolve
from xoron_core.errors import UsageError
from xoron_core.plugins import registry


def schema(
    key: Annotated[str, typer.Argument(help="KIND/NAME of a component, or `composition`.")],
) -> None:
    """Print the JSON schema of a component's config; editors complete from it.

    Example: xoron schema backbone/xoron-moe
    """
    if key == "composition":
        print(json.dumps(Composition.model_json_schema(), indent=2))
        return
    kind, slash, name = key.partition("/")
    if not slash or kind not in KINDS:
        options = ", ".join(registry().components())
        raise UsageError(f"expected KIND/NAME or `composition`, got {key!r}; there are: {options}")
    component = registry().component(kind, name)
    print(json.dumps(resolve(component.config).model_json_schema(), indent=2))
