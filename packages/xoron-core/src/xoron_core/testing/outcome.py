"""What a check can come to, and the report over all of them. Imports nothing heavy."""

from __future__ import annotations

import json
import unittest
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

NEEDS = "needs"
Status = Literal["passed", "failed", "skipped", "expected"]


class CheckFailed(AssertionError):  # noqa: N818 - a result, not an error of the kit
    """A component breaks a promise. The message names the hook or method, and the fix."""


class CheckSkipped(unittest.SkipTest):
    """A check has nothing to look at, or another one failed first; pytest reports it as a skip."""

    @property
    def blocked(self) -> bool:
        """Whether it is skipped because a check that it needs failed."""
        return str(self).startswith(NEEDS)


@dataclass(frozen=True)
class Result:
    """What became of one check.

    Attributes:
        id: `component-key/check-id`, such as `encoder/ecg/gradients`, or `plugin/check-id`.
        status: `expected` is a failure that was announced with a reason.
        message: why it failed or was skipped; empty when passed.
        seconds: wall-clock time.
    """

    id: str
    status: Status
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The results of all checks of one plug-in, in the order in which they ran."""

    plugin: str
    distribution: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed."""
        found = self.counts
        return found["failed"] == 0 and found["passed"] > 0

    @property
    def counts(self) -> Counter[str]:
        """How many checks there are of each status."""
        return Counter(result.status for result in self.results)

    def table(self) -> str:
        """Returns one line per check, the messages below their line, and a last line of counts."""
        width = max((len(result.id) for result in self.results), default=0)
        lines = []
        for result in self.results:
            lines.append(f"{result.status:<8}  {result.id:<{width}}  {result.seconds:6.2f} s")
            lines += [f"          {line}" for line in result.message.splitlines()]
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        total = sum(result.seconds for result in self.results)
        lines.append(f"{self.plugin} ({self.distribution}): {counts or 'no check'}; {total:.1f} s")
        return "\n".join(lines)

    def json(self) -> str:
        """Returns the report as JSON."""
        data = {
            "plugin": self.plugin,
            "distribution": self.distribution,
            "ok": self.ok,
            "counts": dict(self.counts),
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(data, indent=2)
