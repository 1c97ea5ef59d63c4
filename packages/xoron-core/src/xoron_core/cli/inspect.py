"""`xoron inspect`, and the table it shares with `xoron compose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xoron_core.cli.plugin_list import print_table

if TYPE_CHECKING:
    from xoron_core.composer.planner import Plan


def print_plan(planned: Plan, lock: dict[str, Any] | None = None) -> None:
    """Prints slots, exact parameters, memory and the token space."""
    print(planned.composition.name)
    rows: list[tuple[str, ...]] = [("SLOT", "COMPONENT", "PACKAGE", "TOTAL", "ACTIVE", "TRAINABLE")]
    for row in planned.rows:
        numbers = (f"{n:,}" for n in (row.parameters, row.active, row.trainable))
        rows.append((row.slot, row.component, row.distribution, *numbers))
    totals = (
        sum(getattr(r, key) for r in planned.rows) for key in ("parameters", "active", "trainable")
    )
    rows.append(("total", "", "", *(f"{n:,}" for n in totals)))
    print_table(rows)
    memory = planned.memory
    print(f"memory, fp32: weights {_size(memory['weights'])}, training {_size(memory['training'])}")
    if planned.cache_bytes_per_token:
        print(f"cache: {planned.cache_bytes_per_token:,} bytes per token")
    if planned.space is not None:
        print(f"token space: {planned.space.size:,} rows, {planned.space.hash}")
    if lock is not None:
        versions = {"xoron-core": lock.get("xoron-core", "?"), **lock.get("plugins", {})}
        print("made with: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model folder: slots, parameters, cache size, token space, plug-in versions.

    Example: xoron inspect out/ --json
    """
    from xoron_core.composer.planner import plan
    from xoron_core.folder import LOCK, check_files, read_config, read_space
    from xoron_core.plugins import registry

    config, composition = read_config(folder)
    space = read_space(folder, config.token_space_hash)
    check_files(folder)
    planned = plan(composition, registry(), lock=space)
    lock_path = folder / LOCK
    lock = json.loads(lock_path.read_text(encoding="utf-8")) if lock_path.exists() else {}
    if as_json:
        print(json.dumps(planned.data() | {"lock": lock}, indent=2))
    else:
        print_plan(planned, lock)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
