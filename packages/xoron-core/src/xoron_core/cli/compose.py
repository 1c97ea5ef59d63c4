"""`xoron compose`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.inspect import print_plan
from xoron_core.cli.progress import working
from xoron_core.errors import UsageError
from xoron_core.plugins import registry

logger = logging.getLogger("xoron")


def compose(
    plugins: Annotated[
        str | None, typer.Option("--plugins", help="Choose from these, e.g. llm,vision or -video.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A composition preset; tiny by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The model folder to write.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A composition in YAML, over the preset.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: slot.key=value.")
    ] = None,
    extend: Annotated[
        Path | None, typer.Option("--extend", help="Add to this model folder; its ids stay.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For initialisation.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and print, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compose a model from the installed plug-ins and write its folder.

    With --extend, what is composed is added to a model folder: its parts keep their weights and its
    ids their meaning, and new ids are appended.

    Example: xoron compose --plugins llm --preset tiny -o out/ --set backbone.num_layers=4
    """
    if output is None and not dry_run:
        raise UsageError("where should the model go? Add -o DIR, or --dry-run to plan only")
    from xoron_core.api import build, save
    from xoron_core.composer.addition import joined
    from xoron_core.composer.composition import read_composition
    from xoron_core.composer.planner import plan
    from xoron_core.folder import read_config, read_space
    from xoron_core.migrate import extend as build_extended

    chosen = registry().select(plugins)
    composition = read_composition(
        chosen,
        file=str(file) if file else None,
        preset=preset,
        overrides=overrides or (),
        addition=extend is not None,
    )
    lock = None
    if extend is not None:
        config, base = read_config(extend)
        composition = joined(base, composition)
        lock = read_space(extend, config.token_space_hash)
    planned = plan(composition, chosen, lock)
    if not dry_run:
        assert output is not None
        if output.exists() and any(output.iterdir()) and not (output / "config.json").exists():
            raise UsageError(
                f"{output}: holds files that are no model; choose a new or empty folder"
            )
        with working(f"composing {composition.name}"):
            if extend is None:
                model, processor = build(planned, chosen, seed=seed)
            else:
                model, processor = build_extended(extend, planned, chosen, seed=seed)
            save(model, processor, output)
        logger.info("wrote %s", output)
    if as_json:
        print(json.dumps(planned.data() | {"folder": str(output) if output else None}, indent=2))
    else:
        print_plan(planned)
