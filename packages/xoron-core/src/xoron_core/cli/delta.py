"""`xoron delta save|apply|show`: of trained slots, and of trained vocabulary rows."""

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
        "Save, apply or show trained slots and vocabulary rows apart from their base.\n\n"
        "Example: xoron delta save run/model --slot image.projector -o connector"
    ),
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("save")
def save(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The delta's folder.")],
    slots: Annotated[
        list[str] | None, typer.Option("--slot", help="A slot to save; may be repeated.")
    ] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Save the vocabulary rows that a text base lacks.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Save slots or vocabulary rows of a model folder, with the identity of their base.

    Example: xoron delta save run/model --slot image.projector -o connector
    """
    if rows == bool(slots):
        raise UsageError("name what to save: --slot SLOT, once or more, or --rows alone")
    if rows:
        from xoron_core.api import load
        from xoron_core.folder import read_config
        from xoron_core.row_deltas import save_rows

        read_config(model)  # `load` would ask the Hub for an absent folder
        with working(f"hashing {model}"):
            save_rows(load(model)[0], output)
    else:
        from xoron_core.deltas import save_delta

        with working(f"hashing {model}"):
            save_delta(model, output, slots=slots or ())
    _print(output, as_json=as_json)


@app.command("apply")
def apply(
    model: Annotated[Path, typer.Argument(help="The base, a model folder.")],
    deltas: Annotated[list[Path], typer.Argument(help="Folders of deltas, in this order.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model folder to write.")],
    trust_base: Annotated[
        bool,
        typer.Option(
            "--trust-base",
            help="Take rows of the old form (trainable_rows.pt), which name no base.",
        ),
    ] = False,
) -> None:
    """Put deltas over their base and write the whole model.

    Example: xoron delta apply base connector -o whole
    """
    from xoron_core.api import load
    from xoron_core.api import save as save_model
    from xoron_core.row_deltas import is_old, load_rows

    if output.exists() and any(output.iterdir()) and not (output / "config.json").exists():
        raise UsageError(f"{output}: holds files that are no model; choose a new or empty folder")
    # What names its base is checked against it, so what names none goes over it last.
    old = [path for path in deltas if trust_base and is_old(path)]
    if trust_base and (not old or deltas[-len(old) :] != old):
        raise UsageError("--trust-base: name folders with trainable_rows.pt, behind all others")
    with working(f"loading {model}"):
        loaded, processor = load(model, deltas=[path for path in deltas if path not in old])
        for path in old:
            load_rows(loaded, path, trust_base=True)
    with working(f"writing {output}"):
        save_model(loaded, processor, output)
    logger.info("wrote %s", output)


@app.command("show")
def show(
    delta: Annotated[Path, typer.Argument(help="A delta's folder.")], as_json: Json = False
) -> None:
    """Show what a delta holds and its base, and check its tensors.

    Example: xoron delta show connector
    """
    _print(delta, as_json=as_json)


def _print(folder: Path, *, as_json: bool) -> None:
    from xoron_core.deltas import Base, brief, read_delta
    from xoron_core.row_deltas import holds_rows, read_rows

    base: Base | None
    if holds_rows(folder):
        found = read_rows(folder).record
        data, base, space_hash = found.data(), found.base, found.token_space_hash
        rows = [("ROWS", "SLOT", "PARAMETERS", "DTYPE", "HASH")]
        ids = ", ".join(f"{start} .. {stop - 1}" for start, stop in found.rows)
        rows.append((ids, found.slot, f"{found.parameters:,}", found.dtype, brief(found.hash)))
        adapter = None
    else:
        record = read_delta(folder).record
        data, base, space_hash = record.data(), record.base, record.token_space_hash
        rows = [("SLOT", "COMPONENT", "PARAMETERS", "DTYPE", "HASH")]
        for name, one in record.slots.items():
            component = f"{one.slot.kind}/{one.slot.use}"
            rows.append((name, component, f"{one.parameters:,}", one.dtype, brief(one.hash)))
        adapter = record.adapter
    if as_json:
        print(json.dumps({"folder": str(folder), **data}, indent=2))
        return
    print_table(rows)
    over = ", ".join(f"{slot} {brief(one)}" for slot, one in (base.slots if base else {}).items())
    print(f"base: {over or 'nothing'}")
    print(f"token space: {space_hash or 'none'}")
    if adapter is not None:
        print(f"goes with: {adapter.file} {brief(adapter.hash)}")
