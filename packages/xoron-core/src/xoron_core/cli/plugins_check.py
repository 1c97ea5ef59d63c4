"""`xoron plugins check`: the conformance kit on one plug-in, imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from xoron_core.cli.progress import working
from xoron_core.errors import UsageError


def check(
    plugin: Annotated[
        str,
        typer.Argument(
            help="The plug-in's name, its module, or a path to its source.", metavar="NAME|PATH"
        ),
    ],
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="ID", help="Only this check or component."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Seconds that one check may take.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a plug-in works with every other one; exit code 1 if it does not.

    Example: xoron plugins check llm --only backbone/xoron-moe
    """
    if time_limit <= 0:
        raise UsageError(f"--time-limit: expected seconds above 0, got {time_limit:g}")
    from xoron_core.testing.run import run_checks

    with working(f"checking {plugin}"):
        report = run_checks(plugin, time_limit=time_limit, only=only)
    print(report.json() if as_json else report.table())
    if not report.ok:
        raise typer.Exit(1)
