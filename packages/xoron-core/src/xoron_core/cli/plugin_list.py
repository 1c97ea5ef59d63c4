"""What `xoron plugins list|show` print. Imports nothing heavy, not even typer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from xoron_core.descriptors import KINDS
from xoron_core.plugins import Plugin, registry


def print_list(*, as_json: bool = False, selection: str | None = None) -> None:
    """Prints every plug-in with its state."""
    chosen = registry().select(selection)
    if as_json:
        print(json.dumps([_data(plugin) for plugin in chosen.plugins], indent=2))
        return
    rows = [("PLUGIN", "STATE", "DISTRIBUTION", "VERSION", "COMPONENTS")]
    for plugin in chosen.plugins:
        names = ", ".join(c.key for c in plugin.contribution.components)
        origin = plugin.origin
        rows.append((plugin.name, plugin.state, origin.distribution, origin.version, names))
    print_table(rows)
    for plugin in chosen.plugins:
        if plugin.problem and plugin.state != "disabled":
            print(f"\n{plugin.name}: {plugin.problem}")


def print_one(name: str, *, as_json: bool = False) -> None:
    """Prints all that one plug-in contributes."""
    plugin = registry().plugin(name)
    if as_json:
        print(json.dumps(_data(plugin), indent=2))
        return
    print(f"{plugin.name}: {plugin.state}")
    print(f"{plugin.origin.distribution} {plugin.origin.version}, module {plugin.module}")
    if plugin.problem:
        print(plugin.problem)
    found = plugin.contribution
    for kind in KINDS:
        for component in found.components:
            if component.kind == kind:
                print(f"  {component.key:<28} {component.summary}")
    for modality in found.modalities:
        print(f"  modality {modality.name:<19} {modality.begin} ... {modality.end}")
    for group in found.token_groups:
        print(f"  tokens {group.name:<21} {len(group.tokens)} special tokens")
    for preset in found.presets:
        print(f"  preset {preset.name:<21} {preset.component or 'composition'}")
    for command in found.commands:
        print(f"  command {command.name:<20} {command.help}")
    for hook, values in found.extras.items():
        print(f"  {hook:<28} {', '.join(getattr(v, 'name', str(v)) for v in values)}")


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Prints rows in aligned columns; the first row is the head."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _data(plugin: Plugin) -> dict[str, Any]:
    found = plugin.contribution
    return {
        "name": plugin.name,
        "state": plugin.state,
        "problem": plugin.problem,
        "distribution": plugin.origin.distribution,
        "version": plugin.origin.version,
        "origin": plugin.origin.location,
        "module": plugin.module,
        "components": [
            {"kind": c.kind, "name": c.name, "modality": c.modality, "summary": c.summary}
            for c in found.components
        ],
        "modalities": [m.name for m in found.modalities],
        "token_groups": [g.name for g in found.token_groups],
        "presets": [{"name": p.name, "component": p.component} for p in found.presets],
        "commands": [c.name for c in found.commands],
    }
