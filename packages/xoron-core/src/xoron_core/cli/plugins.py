"""`xoron plugins list|show|check|new`; the light path to `list` is in `xoron_core.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from xoron_core.cli.plugin_list import print_list, print_one
from xoron_core.cli.plugins_check import check
from xoron_core.cli.plugins_new import new

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show, check or start plug-ins.\n\nExample: xoron plugins show llm",
)


@app.command("list")
def list_command(
    plugins: Annotated[
        str | None, typer.Option("--plugins", help="Use only these, e.g. llm,-video.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every installed plug-in with its state.

    Example: xoron plugins list --json
    """
    print_list(as_json=as_json, selection=plugins)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="The plug-in's name, e.g. llm.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what one plug-in contributes.

    Example: xoron plugins show llm
    """
    print_one(name, as_json=as_json)


app.command("check")(check)
app.command("new")(new)
