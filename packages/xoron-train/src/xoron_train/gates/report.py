"""What a suite found: a JSON file beside a table, bound to the weights that it is about.

`MODEL/gates/SUITE.json` holds the hash of every slot's tensors, so that it says nothing about a
model that was trained further, and all figures of the evaluations, so that it can be judged again.

Footgun: the hashes find mistakes. They are no signature: who can write the file can forge it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xoron_core.config import Config, Source
from xoron_core.errors import FolderError
from xoron_core.folder import read_config
from xoron_core.identity import combined, folder_weights, identities
from xoron_core.storage import atomic_file
from xoron_train.evaluations.base import Check
from xoron_train.gates.suite import MINIMUM

FORMAT = 1
_FOLDER = "gates"


class Weights(Config):
    """Which weights a report is about.

    Attributes:
        hash: of all slots.
        slots: identity of each.
        token_space_hash: of the model, None where it has none.
    """

    hash: str
    slots: dict[str, str]
    token_space_hash: str | None = None


class CheckRecord(Config):
    """One figure beside its threshold, as `xoron_train.evaluations.base.Check` says."""

    figure: str
    value: float
    samples: int
    at_least: float | None = None
    at_most: float | None = None
    interval: tuple[float, float] | None = None
    passed: bool


class GateRecord(Config):
    """One gate.

    Attributes:
        use: the evaluation.
        config: what it was asked with.
        samples: conversations that it was asked on.
        checks: its figures with a threshold.
        record: all that the evaluation returned.
        passed: all checks.
    """

    use: str
    config: dict[str, Any]
    samples: int
    checks: list[CheckRecord]
    record: dict[str, Any]
    passed: bool


class Report(Config):
    """The contents of a report.

    Attributes:
        format: of this file.
        suite: its name.
        model: what it is about.
        gates: by name.
        versions: of the packages that were used.
        passed: all gates.
    """

    format: int
    suite: str
    model: Weights
    gates: dict[str, GateRecord]
    versions: dict[str, str]
    passed: bool

    def few(self) -> list[str]:
        """The gates that were asked on fewer samples than a suite asks by itself."""
        return [name for name, gate in self.gates.items() if gate.samples < MINIMUM]


def report_path(model: Path, suite: str) -> Path:
    """Where a model folder carries the report of a suite."""
    return model / _FOLDER / f"{suite}.json"


def weights_of(model: Path) -> Weights:
    """The identity of a model folder's weights.

    Raises:
        FolderError: if it is no model folder, or is damaged.
    """
    config, composition = read_config(model)
    weights = folder_weights(model, composition.slots)
    slots = identities({slot: group for slot, group in weights.items() if group})
    return Weights(hash=combined(slots), slots=slots, token_space_hash=config.token_space_hash)


def check_record(check: Check) -> CheckRecord:
    """A check as plain data."""
    return CheckRecord(**vars(check), passed=check.passed)


def write_report(report: Report, path: Path) -> None:
    """Writes a report, whole or not at all.

    Raises:
        FolderError: if that fails.
    """
    with atomic_file(path) as aside:
        text = json.dumps(report.data(), indent=2, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """Reads a report.

    Raises:
        FolderError: if it is missing, damaged or of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); run the suite again") from None
    number = data.get("format") if isinstance(data, dict) else None
    if number != FORMAT:
        raise FolderError(
            f"{path}: has report format {number!r}, this xoron-train reads {FORMAT}; run the suite"
            " again"
        )
    return Report.parse(data, Source(str(path)))


def table(report: Report) -> list[tuple[str, ...]]:
    """The rows that tell a person what a report says, the head first."""
    head = ("GATE", "FIGURE", "VALUE", "REQUIRED", "SAMPLES", "95 % INTERVAL", "RESULT")
    rows: list[tuple[str, ...]] = [head]
    for name, gate in report.gates.items():
        for check in gate.checks:
            interval = "" if check.interval is None else _joined(check.interval)
            result = "passed" if check.passed else "FAILED"
            shown = (f"{check.value:.4g}", _required(check), str(check.samples), interval, result)
            rows.append((name, check.figure, *shown))
    return rows


def failures(checks: Mapping[str, Sequence[Check]]) -> list[str]:
    """What did not pass, in words, from checks by gate."""
    return [
        f"{name}: {check.figure} is {check.value:.4g}, required {_required(check)}"
        for name, found in checks.items()
        for check in found
        if not check.passed
    ]


def _required(check: Check | CheckRecord) -> str:
    least = "" if check.at_least is None else f">= {check.at_least:g}"
    most = "" if check.at_most is None else f"<= {check.at_most:g}"
    return ", ".join(part for part in (least, most) if part)


def _joined(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3g} .. {interval[1]:.3g}"
