"""Runs the checks of a plug-in: one by one under pytest, or all of them into a report.

Footgun: `BoundCheck` runs in this process and stops what runs too long by a signal, which reaches
Python code and system calls only. `run_checks` therefore works in a process of its own by default,
which it kills.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xoron_core.errors import UsageError, did_you_mean
from xoron_core.testing.catalogue import MODEL, PLUGIN, Check, checks
from xoron_core.testing.limit import TimeLimitError, time_limit
from xoron_core.testing.outcome import (
    NEEDS,
    CheckFailed,
    CheckSkipped,
    Report,
    Result,
    Status,
)
from xoron_core.testing.target import START_SECONDS, Target, find

if TYPE_CHECKING:
    import pytest

TIME_LIMIT = 60.0
LOADS = "loads"


@dataclass(frozen=True)
class BoundCheck:
    """A check with what it looks at; calling it runs it.

    Attributes:
        id: `component-key/check-id`, or `plugin/check-id`.
        check: the check.
        subject: a `Subject`, or the `Target` for what holds of the plug-in as a whole.
        seconds: its time limit.
    """

    id: str
    check: Check
    subject: Any
    seconds: float = TIME_LIMIT

    def __repr__(self) -> str:
        return f"BoundCheck({self.id!r})"

    def __call__(self) -> None:
        """Runs the check, or answers again what it came to.

        Raises:
            CheckFailed: with what is wrong, where, and the fix.
            CheckSkipped: where there is nothing to check, or a check that it needs did not pass.
        """
        if (error := self._outcome(self.check)) is not None:
            raise error

    def _outcome(self, check: Check) -> Exception | None:
        target, key = self._place
        if (key, check.id) not in target.memo:
            target.memo[key, check.id] = self._run(check)
        return target.memo[key, check.id]

    @property
    def _place(self) -> tuple[Target, str]:
        whole = isinstance(self.subject, Target)
        return self.subject if whole else self.subject.target, self.id.rpartition("/")[0]

    def _run(self, check: Check) -> Exception | None:
        target, key = self._place
        for name in check.needs:
            need = checks()[name]
            if key.partition("/")[0] in need.kinds and _is_failure(self._outcome(need)):
                return CheckSkipped(f"{NEEDS} {name!r}, which did not pass")
        try:
            with target.on_path(), time_limit(self.seconds):
                check.function(self.subject)
        except (CheckFailed, CheckSkipped) as error:
            return error.with_traceback(None)
        except TimeLimitError as error:
            return CheckFailed(
                f"ran longer than its limit of {self.seconds:g} s{_where(error, target)};"
                " it must end by itself"
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in may raise anything
            said = f"{type(error).__name__}: {error}"
            return CheckFailed(f"{check.summary}: {said}{_where(error, target)}")
        return None


def checks_for(plugin: str | Target, *, time_limit: float = TIME_LIMIT) -> list[BoundCheck]:
    """The checks that apply to a plug-in; imports it, if its import survives a process of its own.

    Args:
        plugin: its name in `xoron plugins list`, its module, or a path to its source.
        time_limit: of each check, in seconds.

    Raises:
        UsageError: if there is no such plug-in.
    """
    target = plugin if isinstance(plugin, Target) else find(plugin)
    target.seconds = time_limit + START_SECONDS
    # A process of its own has the limit itself; this one only waits for it.
    waiting = time_limit + 2 * START_SECONDS
    loads = BoundCheck(f"{PLUGIN[0]}/{LOADS}", checks()[LOADS], target, waiting)
    if _raises(loads):
        return [loads]  # nothing of it can be looked at
    from xoron_core.testing.subject import Subject

    components = target.plugin.contribution.components
    subjects: list[tuple[str, str, Any, float]] = [
        (*PLUGIN, *PLUGIN, target, waiting),
        *((c.kind, c.key, Subject(target, c), time_limit) for c in components),
        (*MODEL, *MODEL, target, time_limit),
    ]
    return [
        BoundCheck(f"{key}/{check.id}", check, subject, limit)
        for kind, key, subject, limit in subjects
        for check in checks().values()
        if kind in check.kinds and check.since <= target.api
    ]


def run_checks(
    plugin: str,
    *,
    time_limit: float = TIME_LIMIT,
    only: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    isolated: bool = True,
) -> Report:
    """Runs all checks of a plug-in, or some.

    Args:
        plugin: as in `checks_for`.
        time_limit: of each check, in seconds.
        only: a check id, a component key, or both (`encoder/ecg/gradients`).
        expected_failures: check id (with or without the component key) to the reason.
        isolated: whether to run in a process of its own, which can hang, crash or exit.

    Raises:
        UsageError: for an unknown plug-in or an unknown check.
    """
    target = find(plugin)
    if isolated:
        from xoron_core.testing.isolated import run_isolated

        results = run_isolated(target, time_limit=time_limit, only=only)
    else:
        results = list(results_of(select(checks_for(target, time_limit=time_limit), only)))
    expected = dict(expected_failures or {})
    if only is None:
        _known(expected, [result.id for result in results])
    judged = tuple(_judge(result, expected) for result in results)
    return Report(target.name, target.distribution, judged)


def results_of(bound: list[BoundCheck]) -> Iterator[Result]:
    """Runs checks one after another."""
    for one in bound:
        start = time.perf_counter()
        status: Status = "passed"
        message = ""
        try:
            one()
        except CheckFailed as error:
            status, message = "failed", str(error)
        except CheckSkipped as error:
            status, message = "skipped", str(error)
        yield Result(one.id, status, message, round(time.perf_counter() - start, 3))


def select(bound: list[BoundCheck], only: str | None) -> list[BoundCheck]:
    """The checks that `only` names.

    Raises:
        UsageError: if it names none.
    """
    if only is None:
        return bound
    chosen = [one for one in bound if _matches(only, one.id) or one.id.startswith(f"{only}/")]
    if not chosen:
        options = [*checks(), *(one.id for one in bound)]
        raise UsageError(
            f"no check {only!r} for this plug-in.{did_you_mean(only, options)} Give a check id, a"
            f" component key or both; checks: {', '.join(checks())}"
        )
    return chosen


def parametrize_with_checks(
    plugin: str, *, expected_failures: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """Makes a test with the argument `check` one test per check of a plug-in.

    Args:
        plugin: as in `checks_for`.
        expected_failures: check id (with or without the component key) to the reason. They are
            strict: one that passes fails the test, so that the list stays true.

    Raises:
        UsageError: for an unknown plug-in, or an expected failure that is no check of it.
    """
    import pytest

    expected = dict(expected_failures or {})
    bound = checks_for(plugin)
    _known(expected, [one.id for one in bound])
    cases = []
    for one in bound:
        reason = next((why for name, why in expected.items() if _matches(name, one.id)), None)
        marks = () if reason is None else pytest.mark.xfail(
            reason=reason, raises=CheckFailed, strict=True
        )  # fmt: skip
        cases.append(pytest.param(one, id=one.id, marks=marks))
    return pytest.mark.parametrize("check", cases)


def _is_failure(outcome: Exception | None) -> bool:
    """Whether what needs this outcome is blocked; a check that did not apply blocks nothing."""
    return isinstance(outcome, CheckFailed) or (
        isinstance(outcome, CheckSkipped) and outcome.blocked
    )


def _raises(bound: BoundCheck) -> bool:
    try:
        bound()
    except (CheckFailed, CheckSkipped):
        return True
    return False


def _matches(name: str, full: str) -> bool:
    return name == full or name == full.rpartition("/")[2]


def _known(expected: Mapping[str, str], ids: list[str]) -> None:
    for name in expected:
        if not any(_matches(name, one) for one in ids):
            raise UsageError(
                f"expected_failures names {name!r}, which is no check of this plug-in."
                f"{did_you_mean(name, [*ids, *checks()])} Remove it or correct its name"
            )


def _judge(result: Result, expected: Mapping[str, str]) -> Result:
    reason = next((why for name, why in expected.items() if _matches(name, result.id)), None)
    if reason is None or result.status == "skipped":
        return result
    if result.status == "failed":
        return Result(result.id, "expected", f"{reason}: {result.message}", result.seconds)
    message = f"expected to fail ({reason}) but passes; remove it from expected_failures"
    return Result(result.id, "failed", message, result.seconds)


def _where(error: BaseException, target: Target) -> str:
    """The innermost line of the plug-in's own code that an error came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if _is_own(path, target):
            return f" (in {frame.name}, {path.name}:{frame.lineno})"
    return ""


def _is_own(path: Path, target: Target) -> bool:
    if target.point.value.partition(".")[0] in path.parts:
        return True
    bare = any(Path(folder) in path.parents for folder in target.paths)
    return bare and "site-packages" not in path.parts
