"""`xoron delta save|apply|show`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.plugin_list import print_table
from xoron_core.cli.progress import working
from xoron_core.errors import UsageError

logger = logging.getLogger("xoron")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help=(
        "Save, apply or show trained slots apart from their base.\n\n"
        "Example: xoron delta save run/model --slot image.projector -o connector"
    ),
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("save")
def save(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    slots: Annotated[list[str], typer.Option("--slot", help="A slot to save; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The delta's folder.")],
    as_json: Json = False,
) -> None:
    """Save slots of a model folder, with the identity of the base they belong to.

    Example: xoron delta save run/model --slot image.projector -o connector
    """
    from xoron_core.deltas import save_delta

    with working(f"hashing {model}"):
        save_delta(model, output, slots=slots)
    _print(output, as_json=as_json)


@app.command("apply")
def apply(
    model: Annotated[Path, typer.Argument(help="The base, a model folder.")],
    deltas: Annotated[list[Path], typer.Argument(help="Folders of deltas, in this order.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model folder to write.")],
) -> None:
    """Put deltas over their base and write the whole model.

    Example: xoron delta apply base connector -o whole
    """
    from xoron_core.api import load
    from xoron_core.api import save as save_model

    if output.exists() and any(output.iterdir()) and not (output / "config.json").exists():
        raise UsageError(f"{output}: holds files that are no model; choose a new or empty folder")
    with working(f"loading {model}"):
        loaded, processor = load(model, deltas=deltas)
    with working(f"writing {output}"):
        save_model(loaded, processor, output)
    logger.info("wrote %s", output)


@app.command("show")
def show(
    delta: Annotated[Path, typer.Argument(help="A delta's folder.")], as_json: Json = False
) -> None:
    """Show a delta's slots and its base, and check its tensors.

    Example: xoron delta show connector
    """
    _print(delta, as_json=as_json)


def _print(folder: Path, *, as_json: bool) -> None:
    from xoron_core.deltas import brief, read_delta

    record = read_delta(folder).record
    if as_json:
        print(json.dumps({"folder": str(folder), **record.data()}, indent=2))
        return
    rows = [("SLOT", "COMPONENT", "PARAMETERS", "DTYPE", "HASH")]
    for name, found in record.slots.items():
        component = f"{found.slot.kind}/{found.slot.use}"
        rows.append((name, component, f"{found.parameters:,}", found.dtype, brief(found.hash)))
    print_table(rows)
    over = ", ".join(f"{slot} {brief(identity)}" for slot, identity in record.base.slots.items())
    print(f"base: {over or 'nothing'}")
    print(f"token space: {record.token_space_hash or 'none'}")
    if record.adapter is not None:
        print(f"goes with: {record.adapter.file} {brief(record.adapter.hash)}")
