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
    seed: Annotated[int, typer.Option("--seed", help="For initialisation.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and print, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compose a model from the installed plug-ins and write its folder.

    Example: xoron compose --plugins llm --preset tiny -o out/ --set backbone.num_layers=4
    """
    if output is None and not dry_run:
        raise UsageError("where should the model go? Add -o DIR, or --dry-run to plan only")
    from xoron_core.api import build, save
    from xoron_core.composer.composition import read_composition
    from xoron_core.composer.planner import plan

    chosen = registry().select(plugins)
    composition = read_composition(
        chosen, file=str(file) if file else None, preset=preset, overrides=overrides or ()
    )
    planned = plan(composition, chosen)
    if not dry_run:
        assert output is not None
        if output.exists() and any(output.iterdir()) and not (output / "config.json").exists():
            raise UsageError(
                f"{output}: holds files that are no model; choose a new or empty folder"
            )
        with working(f"composing {composition.name}"):
            model, processor = build(planned, chosen, seed=seed)
            save(model, processor, output)
        logger.info("wrote %s", output)
    if as_json:
        print(json.dumps(planned.data() | {"folder": str(output) if output else None}, indent=2))
    else:
        print_plan(planned)
