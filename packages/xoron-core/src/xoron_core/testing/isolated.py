"""Runs checks in a process of its own, which may hang, crash or exit; the rest goes on in another.

The worker writes a JSON line before and after each check to its standard output as it was at the
start; whatever a plug-in prints goes to standard error. A check over its limit first meets the
signal in the worker; where that does not reach (a loop in C), the worker is killed.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any

from xoron_core.errors import UsageError
from xoron_core.testing.outcome import CheckFailed, CheckSkipped, Result
from xoron_core.testing.run import checks_for, results_of, select
from xoron_core.testing.target import Target, find

GRACE_SECONDS = 5.0
# Until torch and the plug-in are imported; the import has been tried in another process before.
STARTUP_SECONDS = 120.0


def run_isolated(target: Target, *, time_limit: float, only: str | None) -> list[Result]:
    """The results of a plug-in's checks; see `xoron_core.testing.run.run_checks`.

    Raises:
        UsageError: as the worker says it.
    """
    results: list[Result] = []
    while True:
        running, fate = _session(target.given, time_limit, only, results)
        if not fate:
            return results
        results.append(Result(running or "plugin/loads", "failed", fate))
        if running is None:
            return results


def _session(
    given: str, limit: float, only: str | None, results: list[Result]
) -> tuple[str | None, str]:
    """Runs one worker; adds to `results`.

    Returns:
        the check that was running when it ended, and how it ended; empty where all are done.
    """
    task = {"given": given, "limit": limit, "only": only, "done": [asdict(r) for r in results]}
    command = [sys.executable, "-m", "xoron_core.testing.isolated", json.dumps(task)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    running, patience = None, STARTUP_SECONDS
    try:
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                return running, f"did not end within its limit of {limit:g} s and was killed"
            if line is None:
                return running, f"ended the process (exit code {process.wait()})"
            said = json.loads(line)
            if "error" in said:
                raise UsageError(said["error"])
            if said.get("end"):
                return None, ""
            if "result" in said:
                results.append(Result(**said["result"]))
                running, patience = None, STARTUP_SECONDS
            else:
                running, patience = said["start"], said["seconds"] + GRACE_SECONDS
    finally:
        process.kill()
        process.wait()


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def work(task: dict[str, Any], out: IO[str]) -> None:
    """What the worker does: runs the checks that are not done, and says so line by line."""

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    try:
        target = find(task["given"])
        done = [Result(**result) for result in task["done"]]
        _remember(target, done)
        bound = select(checks_for(target, time_limit=task["limit"]), task["only"])
    except UsageError as error:
        say(error=str(error))
        return
    finished = {result.id for result in done}
    for one in bound:
        if one.id not in finished:
            say(start=one.id, seconds=one.seconds * (1 + len(one.check.needs)))
            for result in results_of([one]):
                say(result=asdict(result))
    say(end=True)


def _remember(target: Target, done: Iterable[Result]) -> None:
    """What an earlier worker found, so that what hung once is not asked again."""
    for result in done:
        key, _, name = result.id.rpartition("/")
        error = {"failed": CheckFailed, "skipped": CheckSkipped}.get(result.status)
        target.memo[key, name] = error(result.message) if error else None


if __name__ == "__main__":
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as private:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        work(json.loads(sys.argv[1]), private)
