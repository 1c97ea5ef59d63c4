"""What the installed plug-ins offer by name: recipes, data sets, evaluations."""

from __future__ import annotations

from typing import Any

from xoron_core.errors import UsageError, did_you_mean
from xoron_core.plugins import registry

_HOOKS = {
    "recipe": "xoron_recipes",
    "data set": "xoron_datasets",
    "evaluation": "xoron_evaluations",
}


def offered(kind: str) -> dict[str, Any]:
    """Descriptors by name.

    Args:
        kind: `recipe`, `data set` or `evaluation`.

    Raises:
        UsageError: if two plug-ins offer one name.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for plugin, item in registry().extra(_HOOKS[kind]):
        if item.name in found:
            raise UsageError(
                f"{kind} {item.name!r} is offered by the plug-ins {owners[item.name]!r} and"
                f" {plugin!r}; leave one out with --plugins -{plugin}"
            )
        found[item.name], owners[item.name] = item, plugin
    return found


def find(kind: str, name: str, *, where: str = "", hint: str = "") -> Any:
    """One descriptor by its name.

    Args:
        kind: as for `offered`.
        name: as a recipe writes it.
        where: what the error begins with, such as the key.
        hint: what else could have been meant, for the error's end.

    Raises:
        UsageError: with the closest name, and all there are.
    """
    known = offered(kind)
    if name not in known:
        raise UsageError(
            f"{where and where + ': '}unknown {kind} {name!r}.{did_you_mean(name, known)}"
            f" {kind[0].upper()}{kind[1:]}s of the installed plug-ins:"
            f" {', '.join(sorted(known)) or 'none'}{hint or '.'}"
        )
    return known[name]
