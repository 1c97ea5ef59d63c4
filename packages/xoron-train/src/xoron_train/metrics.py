"""Where numbers go: `metrics.jsonl`, TensorBoard, and a progress line.

`metrics.jsonl` holds one JSON object per line, `kind` being `train` or `eval`. On resume it is cut
back to the checkpoint's step, so that the finished file holds every step once, whatever happened
on the way.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xoron_core.errors import FolderError

logger = logging.getLogger("xoron.train")

_SECONDS_BETWEEN_LINES = 15.0
_BOARD_BYTES = 256 * 1024  # more than TensorBoard's writer holds back


def bits_per_byte(nats: float, num_bytes: int) -> float | None:
    """Converts a summed negative log-likelihood to bits per byte, None where no byte counts."""
    return nats / (num_bytes * math.log(2)) if num_bytes else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def shown_evaluation(record: Mapping[str, Any]) -> list[str]:
    """The lines that tell a person what an evaluation's record says."""
    lines = []
    if "loss" in record:
        per_token = " nats/token" if "tokens" in record else ""
        lines.append(f"held-out loss: {record['loss']:.4f}{per_token}")
        lines += [f"held-out {name}: {loss:.4f}" for name, loss in record.get("losses", {}).items()]
        if record.get("bits_per_byte") is not None:
            lines.append(f"held-out bits per byte: {record['bits_per_byte']:.4f}")
    for slot, losses in record.get("budgets", {}).items():
        shown = ", ".join(f"{loss:.4f} with {count}" for count, loss in losses.items())
        lines.append(f"held-out loss by positions of {slot}: {shown}")
    for name, result in record.get("evaluations", {}).items():
        lines += [f"{name}: {key} {_short(value)}" for key, value in result.items()]
    return lines


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else json.dumps(value)


class MetricsLog:
    """Appends records to `metrics.jsonl` and, if wanted, to TensorBoard.

    Args:
        run: the run's folder.
        after: records of later steps are removed; 0 for a new run.
        last: the run's last step, whose evaluation is always made anew.
        tensorboard: whether to write event files too.
    """

    def __init__(self, run: Path, *, after: int, last: int, tensorboard: bool) -> None:
        path = run / "metrics.jsonl"
        kept = [
            record
            for record in read_metrics(path)
            if record["step"] <= after and (record["kind"], record["step"]) != ("eval", last)
        ]
        aside = path.with_suffix(".partial")
        self.run = run
        self.board: Any = None
        with _explained(run):
            with aside.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in kept)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            self.file = path.open("a", encoding="utf-8")
            if tensorboard:
                self._need_room()
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it is in the file when this returns.

        Raises:
            FolderError: if the disk is full; so do the other methods.
        """
        with _explained(self.run):
            self.file.write(_line(record))
            self.file.flush()
            if self.board is not None:
                self._need_room()
                for key, value in _scalars(record):
                    self.board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def _need_room(self) -> None:
        """TensorBoard writes in a thread whose traceback nobody can catch: stop before that."""
        if shutil.disk_usage(self.run).free < _BOARD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Brings the records to the disk, before a checkpoint that counts on them."""
        with _explained(self.run):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the files."""
        with _explained(self.run):
            try:
                self.file.close()
            finally:
                if self.board is not None:
                    self.board.close()


class ProgressLine:
    """A live bar on a terminal; elsewhere a log line now and then. Everything on standard error.

    Args:
        total: optimizer steps of the run.
        done: steps done before this process started.
        quiet: show nothing.
        unit: what the speed counts; a loss of `tokens` is in nats of each.
    """

    def __init__(
        self, total: int, *, done: int = 0, quiet: bool = False, unit: str = "tokens"
    ) -> None:
        self.total = total
        self.unit = unit
        self.start = self.last_line = time.monotonic()
        self.done_before = done
        self.quiet = quiet
        self.bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("training", total=total, completed=done, note="")
            self.bar.start()

    def update(self, step: int, loss: float, speed: float) -> None:
        """Shows the state after `step` steps, with so many tokens or items a second."""
        per_token = " nats/token" if self.unit == "tokens" else ""
        note = f"loss {loss:.4f}{per_token}, {speed:,.0f} {self.unit}/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
            return
        now = time.monotonic()
        if self.quiet or (now - self.last_line < _SECONDS_BETWEEN_LINES and step < self.total):
            return
        self.last_line = now
        rate = (now - self.start) / max(1, step - self.done_before)
        left = time.strftime("%H:%M:%S", time.gmtime(rate * (self.total - step)))
        logger.info("step %d of %d: %s, ETA %s", step, self.total, note, left)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def _explained(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"{run}: metrics could not be written ({error.strerror or error}). Checkpoints that"
            " stand there are intact; free some space or check the permissions, then run it again"
            " with --resume"
        ) from error


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{key}", value))
    return found
