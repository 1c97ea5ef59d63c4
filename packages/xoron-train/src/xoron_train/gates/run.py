"""Runs a suite on a model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xoron_core.api import load
from xoron_core.errors import ConfigError, UsageError, XoronError
from xoron_train.conversation import Conversation
from xoron_train.evaluation_entries import Entry
from xoron_train.gates.report import FORMAT, GateRecord, Report, check_record, weights_of
from xoron_train.gates.suite import Suite

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

_PACKAGES = ("xoron-core", "xoron-train", "torch", "transformers")


def run_suite(
    folder: str | Path,
    suite: Suite,
    *,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda _name: None,
) -> Report:
    """Asks every gate of a suite of a model; none is left out because another failed.

    Args:
        folder: of the model; it is not changed.
        suite: as `load_suite` returned it.
        device: where the model runs, as torch names it.
        tell: is told the name of each gate before it is asked.

    Raises:
        FolderError: if the folder cannot be opened.
        UsageError: for a device that cannot be used.
        ConfigError: for a gate without a threshold.
        DataError: for a source that holds too little, or what a gate cannot be asked on.
    """
    folder = Path(folder)
    entries = suite.entries()
    samples = {entry.name: suite.samples(entry) for entry in entries}  # before weights are loaded
    weights = weights_of(folder)
    model, processor = load(folder)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # how torch reports what it was not built for
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used ({reason}); name another") from None
    gates = {}
    for entry in entries:
        tell(entry.name)
        gates[entry.name] = _ask(entry, suite, samples[entry.name], model, processor)
    return Report(
        format=FORMAT,
        suite=suite.name,
        model=weights,
        gates=gates,
        versions={name: version(name) for name in _PACKAGES},
        passed=all(gate.passed for gate in gates.values()),
    )


def _ask(
    entry: Entry,
    suite: Suite,
    samples: Sequence[Conversation],
    model: XoronModel,
    processor: XoronProcessor,
) -> GateRecord:
    try:
        record: dict[str, Any] = entry.evaluation.run(model, processor, samples)
        checks = entry.evaluation.checks(record)
    except XoronError as error:
        raise type(error)(f"gates.{entry.name}: {error}") from error
    if not checks:
        raise ConfigError(
            f"gates.{entry.name}: has no threshold, so it is no gate; set one of its thresholds, or"
            f" leave it out with --set gates.{entry.name}=null"
        )
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise XoronError(
            f"gates.{entry.name}: {type(entry.evaluation).__name__} returned what is no plain data"
            f" of finite numbers ({error})"
        ) from None
    return GateRecord(
        use=suite.gates[entry.name]["use"],
        config=entry.config.data(),
        samples=len(samples),
        checks=[check_record(check) for check in checks],
        record=record,
        passed=all(check.passed for check in checks),
    )
