"""The registry: which plug-ins there are, in what state, and what they contribute.

Light on purpose: no torch, no pydantic, no typer. Two plug-ins that offer the same (kind, name) are
in conflict, and the error says how to choose one. How plug-ins are found is in `discovery`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from xoron_core import advice
from xoron_core.descriptors import (
    Command,
    Component,
    Contribution,
    Modality,
    Origin,
    Preset,
    TokenGroup,
)
from xoron_core.errors import PluginError, did_you_mean

GROUP = "xoron"
VARIABLE = "XORON_PLUGINS"
State = Literal["available", "disabled", "incompatible", "broken", "conflict"]


@dataclass(frozen=True)
class Plugin:
    """One installed plug-in and what became of it.

    Attributes:
        name: its entry-point name, which `--plugins` uses.
        state: `available`, or why not.
        problem: the error and its fix, empty when available.
    """

    name: str
    module: str
    origin: Origin
    state: State = "available"
    problem: str = ""
    contribution: Contribution = field(default_factory=Contribution)


class Registry:
    """What the available plug-ins contribute.

    Args:
        plugins: every plug-in found, in the order of their names, core first.
    """

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins = tuple(plugins)

    @cached_property
    def available(self) -> tuple[Plugin, ...]:
        """Plug-ins in use."""
        return tuple(plugin for plugin in self.plugins if plugin.state == "available")

    def plugin(self, name: str) -> Plugin:
        """Returns an installed plug-in by name, in whatever state.

        Raises:
            PluginError: if it is not installed.
        """
        for plugin in self.plugins:
            if plugin.name == name:
                return plugin
        raise PluginError(_unknown_plugin(name, [plugin.name for plugin in self.plugins]))

    def components(self, kind: str | None = None) -> dict[str, Component]:
        """Available components by `kind/name`, of one kind if given."""
        return {
            component.key: component
            for plugin in self.available
            for component in plugin.contribution.components
            if kind in (None, component.kind)
        }

    def component(self, kind: str, name: str) -> Component:
        """Returns one component.

        Raises:
            PluginError: if no plug-in offers it, naming the package or the conflict.
        """
        found = self.components(kind).get(f"{kind}/{name}")
        if found is None:
            raise PluginError(self._absent("component", f"{kind}/{name}", self.components()))
        return found

    def provider(self, component: Component) -> Plugin:
        """Returns the plug-in that offers an available component."""
        return next(
            plugin for plugin in self.available if component in plugin.contribution.components
        )

    def named(self, name: str) -> list[Component]:
        """Available components called `name`, of any kind."""
        return [component for component in self.components().values() if component.name == name]

    def modalities(self) -> dict[str, Modality]:
        """Available modalities by name."""
        return {
            modality.name: modality
            for plugin in self.available
            for modality in plugin.contribution.modalities
        }

    def token_groups(self) -> dict[str, TokenGroup]:
        """Available groups of special tokens by their namespaced name."""
        return {
            group.name: group
            for plugin in self.available
            for group in plugin.contribution.token_groups
        }

    def presets(self, name: str, component: str | None = None) -> list[tuple[str, Preset]]:
        """(plug-in name, preset) of the presets called `name` for one component, or of the
        composition fragments when `component` is None."""
        return [
            (plugin.name, preset)
            for plugin in self.available
            for preset in plugin.contribution.presets
            if preset.name == name and preset.component == component
        ]

    def preset_names(self, component: str | None = None) -> list[str]:
        """Names of the presets for one component, or of composition presets."""
        return sorted(
            {
                preset.name
                for plugin in self.available
                for preset in plugin.contribution.presets
                if preset.component == component
            }
        )

    def commands(self) -> dict[str, Command]:
        """Available sub-commands by name."""
        return {
            command.name: command
            for plugin in self.available
            for command in plugin.contribution.commands
        }

    def extra(self, hook: str) -> list[tuple[str, Any]]:
        """(plug-in name, value) for every value returned by a hook that a plug-in specified."""
        return [
            (plugin.name, value)
            for plugin in self.available
            for value in plugin.contribution.extras.get(hook, ())
        ]

    def select(self, names: str | Iterable[str] | None) -> Registry:
        """Restricts the registry.

        Args:
            names: `llm,vision` keeps only these (and core); `-video` removes one from all.

        Raises:
            PluginError: for a name that is not installed or not usable.
        """
        wanted = _parse_selection(names)
        if not wanted:
            return self
        known = [plugin.name for plugin in self.plugins]
        for sign, name in wanted:
            if name not in known:
                raise PluginError(_unknown_plugin(name, known))
            plugin = self.plugin(name)
            if sign == "+" and plugin.state in ("broken", "incompatible"):
                raise PluginError(
                    f"plug-in {name!r} ({plugin.origin.distribution}) is {plugin.state}:"
                    f" {plugin.problem}"
                )
        only = {name for sign, name in wanted if sign == "+"}
        without = {name for sign, name in wanted if sign == "-"}
        chosen = []
        for plugin in self.plugins:
            off = plugin.name in without or (only and plugin.name not in only)
            if off and plugin.name != "core" and plugin.state in ("available", "conflict"):
                plugin = replace(plugin, state="disabled", problem="not selected")
            elif plugin.state == "conflict":
                plugin = replace(plugin, state="available", problem="")
            chosen.append(plugin)
        return Registry(mark_conflicts(chosen))

    def _absent(self, what: str, key: str, options: Iterable[str]) -> str:
        for plugin in self.plugins:
            offered = [component.key for component in plugin.contribution.components]
            if key in offered and plugin.state != "available":
                return (
                    f"{what} {key!r} comes from plug-in {plugin.name!r}"
                    f" ({plugin.origin.distribution}), which is {plugin.state}: {plugin.problem}"
                )
        if install := advice.install_component(key):
            broken = [p for p in self.plugins if p.origin.distribution == install and p.problem]
            if broken:
                return (
                    f"{what} {key!r} comes from {install}, whose plug-in is {broken[0].state}:"
                    f" {broken[0].problem}"
                )
            return f"{what} {key!r} is not installed; run: pip install {install}"
        return (
            f"no installed plug-in offers {what} {key!r}.{did_you_mean(key, options)}"
            " `xoron plugins list` shows what is installed."
        )


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Returns the installed plug-ins, restricted by the variable XORON_PLUGINS.

    The result is kept for the process; `registry.cache_clear()` looks again.
    """
    from xoron_core.discovery import discover

    # What a plug-in prints while it is loaded is not the result of a command.
    with contextlib.redirect_stdout(sys.stderr):
        found = discover(importlib.metadata.entry_points(group=GROUP))
    return found.select(os.environ.get(VARIABLE))


def mark_conflicts(plugins: list[Plugin]) -> list[Plugin]:
    """Marks every available plug-in that offers a (kind, name) which another one offers too."""
    owners: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        if plugin.state == "available":
            names = [c.key for c in plugin.contribution.components]
            names += [f"modality {m.name}" for m in plugin.contribution.modalities]
            names += [f"command {c.name}" for c in plugin.contribution.commands]
            names += [f"token group {g.name}" for g in plugin.contribution.token_groups]
            # Groups of one plug-in may share a string on purpose: a composition picks one of them.
            strings = (s for g in plugin.contribution.token_groups for s in g.tokens.values())
            names += [f"special token {string!r}" for string in dict.fromkeys(strings)]
            for key in names:
                owners[key].append(plugin)
    problems: dict[str, str] = {}
    for key, claimants in owners.items():
        if len(claimants) > 1:
            who = " and ".join(f"{p.origin.distribution} ({p.name})" for p in claimants)
            # Core is never what the user can do without, so the other one yields.
            blamed = [p for p in claimants if p.name != "core"] or claimants
            for plugin in blamed:
                problems.setdefault(
                    plugin.name,
                    f"{key} is offered by {who}; choose one with --plugins -{blamed[-1].name}"
                    f" (or {VARIABLE}=-{blamed[-1].name})",
                )
    return [
        replace(plugin, state="conflict", problem=problems[plugin.name])
        if plugin.name in problems
        else plugin
        for plugin in plugins
    ]


def _parse_selection(names: str | Iterable[str] | None) -> list[tuple[str, str]]:
    if names is None:
        return []
    parts = names.split(",") if isinstance(names, str) else list(names)
    return [
        ("-", part[1:]) if part.startswith("-") else ("+", part)
        for part in (part.strip() for part in parts)
        if part
    ]


def _unknown_plugin(name: str, known: list[str]) -> str:
    if package := advice.install_plugin(name):
        return f"plug-in {name!r} is not installed; run: pip install {package}"
    return f"unknown plug-in {name!r}.{did_you_mean(name, known)} Installed: {', '.join(known)}."
