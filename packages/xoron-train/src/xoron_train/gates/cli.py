"""`xoron gate`: the command line of `run.run_suite`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger("xoron.train")


def gate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    suite: Annotated[str, typer.Argument(help="A suite's name, or the path of a YAML file.")],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The text model it came from, for gates that compare with it."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: gates.making.samples=512.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where the model runs, e.g. cuda.")
    ] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The report; by default MODEL/gates/SUITE.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Ask a model what a suite asks, and write a report; exit code 1 if a gate is not passed.

    The report lies in the model's folder and names its weights, so that a recipe can require it.

    Example: xoron gate run/model tokens --base base --set mixture.media.path=token-digits
    """
    from xoron_core.cli.plugin_list import print_table
    from xoron_core.folder import read_config
    from xoron_train.gates.report import report_path, table, write_report
    from xoron_train.gates.run import run_suite
    from xoron_train.gates.suite import MINIMUM, load_suite

    read_config(model)  # `load` would ask the Hub for an absent folder
    chosen = load_suite(suite, overrides or (), base=None if base is None else str(base))
    report = run_suite(
        model, chosen, device=device, tell=lambda name: logger.info("asking %s", name)
    )
    path = output or report_path(model, chosen.name)
    write_report(report, path)
    if as_json:
        print(json.dumps(report.data(), indent=2))
    else:
        print_table(table(report))
        for name in report.few():
            number = report.gates[name].samples
            print(f"note: {name} was asked on {number} samples, fewer than {MINIMUM}")
        print(f"{chosen.name}: {'passed' if report.passed else 'FAILED'}")
    logger.info("wrote %s", path)
    if not report.passed:
        raise typer.Exit(1)
