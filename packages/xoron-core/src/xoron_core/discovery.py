"""Finds plug-ins by their entry points and loads each under its own guard.

A plug-in that fails to import, calls `sys.exit`, was written for another API or misnames a hook is
recorded with its problem and harms nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pluggy

from xoron_core import hookspecs
from xoron_core.descriptors import (
    KINDS,
    Command,
    Component,
    Contribution,
    Modality,
    Origin,
    Preset,
    TokenGroup,
)
from xoron_core.errors import did_you_mean
from xoron_core.plugins import Plugin, Registry, mark_conflicts

_HOOKS = {
    "components": ("xoron_components", Component),
    "modalities": ("xoron_modalities", Modality),
    "presets": ("xoron_presets", Preset),
    "token_groups": ("xoron_token_groups", TokenGroup),
    "commands": ("xoron_commands", Command),
}


def discover(entry_points: Iterable[importlib.metadata.EntryPoint]) -> Registry:
    """Loads each entry point under its own guard and collects what it contributes."""
    manager = pluggy.PluginManager("xoron")
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    modules: dict[int, Any] = {}
    points = sorted(
        entry_points, key=lambda p: (p.name != "core", p.name, _distribution(p).distribution)
    )
    for point in points:
        plugin = Plugin(point.name, point.value, _distribution(point))
        if twin := next((p for p in plugins if p.name == point.name), None):
            if twin.origin == plugin.origin and twin.module == plugin.module:
                continue  # the same distribution found twice on the path
            message = (
                f"the name {point.name!r} is claimed by {twin.origin.distribution} and"
                f" {plugin.origin.distribution}; uninstall one of them"
            )
            plugins[plugins.index(twin)] = replace(twin, state="conflict", problem=message)
            plugins.append(replace(plugin, state="conflict", problem=message))
            continue
        module, plugin = _load(plugin)
        if module is not None:
            modules[len(plugins)] = module
        plugins.append(plugin)
    extra_hooks = _register(manager, plugins, modules)
    for index, module in modules.items():
        if plugins[index].state == "available":
            plugins[index] = _collect(plugins[index], module, manager, extra_hooks)
    return Registry(mark_conflicts(plugins))


def _load(plugin: Plugin) -> tuple[Any, Plugin]:
    """Imports a plug-in module and checks the API it was written for."""
    try:
        module = importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in may raise anything
        problem = f"import of {plugin.module} failed: {type(error).__name__}: {error}"
        return None, replace(plugin, state="broken", problem=problem)
    declared = getattr(module, "xoron_api", None)
    if not isinstance(declared, int):
        problem = (
            f"{plugin.module} states no API version; add `xoron_api = {hookspecs.API_VERSION}`"
        )
        return None, replace(plugin, state="incompatible", problem=problem)
    if declared != hookspecs.API_VERSION:
        older = declared < hookspecs.API_VERSION
        package = plugin.origin.distribution if older else "xoron-core"
        problem = (
            f"written for plug-in API {declared}, this xoron-core has {hookspecs.API_VERSION};"
            f" run: pip install --upgrade {package}"
        )
        return None, replace(plugin, state="incompatible", problem=problem)
    return module, plugin


def _register(
    manager: pluggy.PluginManager, plugins: list[Plugin], modules: Mapping[int, Any]
) -> list[str]:
    """Registers every module, adds the hook specifications they bring, names unknown hooks."""
    for index, module in modules.items():
        try:
            manager.register(module, name=plugins[index].name)
            for spec in getattr(module, "xoron_hookspecs", list)():
                manager.add_hookspecs(spec)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
            if manager.get_plugin(plugins[index].name) is not None:
                manager.unregister(name=plugins[index].name)
            problem = f"registration failed: {type(error).__name__}: {error}"
            plugins[index] = replace(plugins[index], state="broken", problem=problem)
    own = {hook for hook, _ in _HOOKS.values()} | {"xoron_hookspecs"}
    known = [name for name in vars(manager.hook) if name.startswith("xoron_")]
    specified = [name for name in known if getattr(manager.hook, name).has_spec()]
    for index, module in modules.items():
        for name in vars(module):
            caller = getattr(manager.hook, name, None) if name.startswith("xoron_") else None
            if caller is None or caller.has_spec():
                continue
            impl = next((i for i in caller.get_hookimpls() if i.plugin is module), None)
            if impl is not None and not impl.optionalhook:
                problem = (
                    f"{plugins[index].module} implements the unknown hook {name!r}."
                    f"{did_you_mean(name, specified)}"
                )
                plugins[index] = replace(plugins[index], state="broken", problem=problem)
    return [name for name in specified if name not in own]


def _collect(
    plugin: Plugin, module: Any, manager: pluggy.PluginManager, extra_hooks: list[str]
) -> Plugin:
    """Calls a plug-in's hooks and checks that they return what they should."""
    fields: dict[str, tuple[Any, ...]] = {}
    extras: dict[str, tuple[Any, ...]] = {}
    try:
        for name, (hook, kind) in _HOOKS.items():
            values = tuple(_call(manager, hook, module))
            wrong = [value for value in values if not isinstance(value, kind)]
            if wrong:
                raise TypeError(f"{hook} returned {wrong[0]!r}; expected {kind.__name__} objects")
            fields[name] = values
        for hook in extra_hooks:
            extras[hook] = tuple(_call(manager, hook, module))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in may raise anything
        problem = f"a hook failed: {type(error).__name__}: {error}"
        return replace(plugin, state="broken", problem=problem)
    contribution = Contribution(**fields, extras=extras)
    if problem := _contradiction(contribution):
        return replace(plugin, state="broken", problem=problem)
    return replace(plugin, contribution=contribution)


def _contradiction(found: Contribution) -> str:
    """What a plug-in says that cannot be true, or an empty string."""
    for component in found.components:
        if component.kind not in KINDS:
            return (
                f"xoron_components: {component.name!r} has the unknown kind {component.kind!r}."
                f"{did_you_mean(component.kind, KINDS)} Kinds: {', '.join(KINDS)}"
            )
    offered = {
        "xoron_components": [component.key for component in found.components],
        "xoron_modalities": [modality.name for modality in found.modalities],
        "xoron_token_groups": [group.name for group in found.token_groups],
        "xoron_commands": [command.name for command in found.commands],
    }
    for hook, names in offered.items():
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            return f"{hook} returns {twice!r} twice; keep one of them"
    return ""


def _call(manager: pluggy.PluginManager, hook: str, module: Any) -> list[Any]:
    for impl in getattr(manager.hook, hook).get_hookimpls():
        if impl.plugin is module:
            return list(impl.function() or ())
    return []


def _distribution(point: importlib.metadata.EntryPoint) -> Origin:
    dist = point.dist
    if dist is None:
        return Origin("unknown", "")
    return Origin(dist.metadata["Name"], dist.version, str(dist.locate_file("")))
