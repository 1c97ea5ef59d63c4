"""Lets training start only from a model that has passed suites: the recipe's key `requires`.

The report that the model folder carries must be about these very weights. Its figures are judged
again, by the suite as it is now: a report that was made with looser thresholds does not help, nor
does one that left a gate out or asked it on fewer samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xoron_core.deltas import brief
from xoron_core.errors import FolderError
from xoron_core.folder import read_config
from xoron_train.gates.report import Report, failures, read_report, report_path, weights_of
from xoron_train.gates.suite import Suite, load_suite


def require_passed(folder: str | Path, names: Iterable[str]) -> None:
    """Refuses a model that has not passed suites.

    Args:
        folder: of the model.
        names: suites that ship with the package, or paths of YAML files.

    Raises:
        FolderError: if a report is missing, about other weights, incomplete or not passed; each
            with the command that mends it.
        ConfigError, UsageError: for a suite that is wrong or unknown.
    """
    folder, weights = Path(folder), None
    for name in names:
        read_config(folder)  # an absent folder is another mistake than an absent report
        suite = load_suite(name, ready=False)
        path, again = report_path(folder, suite.name), f"run: xoron gate {folder} {name}"
        if not path.is_file():
            raise FolderError(
                f"{folder}: this recipe requires that the model has passed the suite {name!r}, and"
                f" it carries no report of it ({path.name} in gates/); {again}"
            )
        report = read_report(path)
        weights = weights or weights_of(folder)
        if report.model.hash != weights.hash:
            ours, theirs = weights.slots, report.model.slots
            other = [slot for slot in {**ours, **theirs} if ours.get(slot) != theirs.get(slot)]
            raise FolderError(
                f"{path}: is about other weights (slots {', '.join(other)}; the model is"
                f" {brief(weights.hash)}, the report says {brief(report.model.hash)}); {again}"
            )
        if wrong := _faults(suite, report):
            raise FolderError(
                f"{folder}: has not passed the suite {name!r}, which this recipe requires:"
                f" {'; '.join(wrong)}. Train it further, then {again}"
            )


def _faults(suite: Suite, report: Report) -> list[str]:
    """What of a suite a report does not show."""
    found = []
    for entry in suite.entries():
        gate = report.gates.get(entry.name)
        if gate is None or gate.use != suite.gates[entry.name]["use"]:
            found.append(f"{entry.name}: was not asked")
        elif gate.samples < entry.config.samples:
            wanted = entry.config.samples
            found.append(f"{entry.name}: was asked on {gate.samples} samples, required {wanted}")
        else:
            found += failures({entry.name: entry.evaluation.checks(gate.record)})
    return found
