"""`xoron doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.progress import working
from xoron_core.doctor import Finding
from xoron_core.plugins import registry

_COLOURS = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def doctor(
    model: Annotated[
        Path | None, typer.Argument(help="A model folder to examine too.", show_default=False)
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also run flex attention and torch.compile.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine plug-ins, versions, devices and kernels, and a model folder if one is given.

    Exits with 1 if something is wrong, with one line for each fault and its fix. With a model, each
    modality is tried: its medium has to change what comes out and to train what is not frozen.

    Example: xoron doctor out/
    """
    with working("examining"):
        findings = list(_findings(model, compiled))
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings)
        for finding in wrong:
            print(f"error: {finding.line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def _findings(model: Path | None, compiled: bool) -> Iterable[Finding]:
    from xoron_core.doctor.installed import examine_plugins, examine_versions
    from xoron_core.doctor.kernels import examine_kernels
    from xoron_core.doctor.machine import examine_machine

    yield from examine_plugins(registry())
    yield from examine_versions()
    yield from examine_machine()
    yield from examine_kernels(compiled=compiled)
    if model is not None:
        from xoron_core.doctor.folder import examine_folder

        yield from examine_folder(model, registry())


def _print(findings: Iterable[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width, and 80 columns break the versions
    table = Table("AREA", "WHAT", "STATE", "FOUND", box=None, pad_edge=False)
    for finding in findings:
        found = "see below" if finding.state == "wrong" else finding.detail
        state = Text(finding.state, _COLOURS[finding.state])
        table.add_row(Text(finding.area), Text(finding.name), state, Text(found))
    console.print(table)
