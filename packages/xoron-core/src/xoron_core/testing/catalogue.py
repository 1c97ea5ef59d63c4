"""The list of checks. Each is a small function under `@check`, in a module of `checks/`.

Footgun: a check that needs another one (a component that does not build has no gradients) names it
in `needs`; it is skipped with that reason, so that one fault fails one check.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from xoron_core.descriptors import KINDS

PLUGIN = ("plugin",)
MODEL = ("model",)
NEURAL = tuple(kind for kind in KINDS if kind != "tokenizer")
MEDIA = ("encoder", "codec", "autoencoder", "generator")

CheckFunction = Callable[[Any], None]


@dataclass(frozen=True)
class Check:
    """One promise that is checked.

    Attributes:
        id: unique, in kebab case.
        kinds: component kinds it applies to; `plugin` for what holds of a plug-in as a whole,
            `model` for what is asked last, when everything else has passed.
        since: first version of the plug-in API that makes the promise.
        summary: one line: what is promised.
        needs: checks whose failure makes it meaningless; those that do not apply to the kind, or
            find nothing to look at, are left out.
        function: takes the `Subject` (or the `Target` of the whole plug-in), raises `CheckFailed`.
    """

    id: str
    kinds: tuple[str, ...]
    since: int
    summary: str
    needs: tuple[str, ...]
    function: CheckFunction


_CHECKS: dict[str, Check] = {}


def check(
    id: str,
    kinds: Iterable[str],
    *,
    since: int,
    summary: str,
    needs: Iterable[str] = ("runs",),
) -> Callable[[CheckFunction], CheckFunction]:
    """Registers a function as a check; see `Check`.

    Raises:
        ValueError: if another function has that id.
    """

    def register(function: CheckFunction) -> CheckFunction:
        if id in _CHECKS:
            raise ValueError(f"two checks are named {id!r}")
        _CHECKS[id] = Check(id, tuple(kinds), since, summary, tuple(needs), function)
        return function

    return register


@lru_cache(maxsize=1)
def checks() -> dict[str, Check]:
    """Returns every check by id, those of `checks/` first."""
    package = importlib.import_module("xoron_core.testing.checks")
    for name in package.ORDER:
        importlib.import_module(f"{package.__name__}.{name}")
    return _CHECKS
