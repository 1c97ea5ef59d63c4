"""What the parts of an audit have in common: faults are counted, the first is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import pyarrow as pa


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: its name.
        passed: None if it could not run.
        detail: figures, the first fault, or what is missing.
    """

    check: str
    passed: bool | None
    detail: str


class Check:
    """Counts faults.

    Attributes:
        name: as the audit's table shows it.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.faults = 0
        self._first = ""

    def fault(self, where: str, what: str) -> None:
        """Notes one."""
        self._first = self._first or f"{where}: {what}"
        self.faults += 1

    def passes(self) -> str:
        """What to say where there is no fault."""
        return ""

    def finding(self) -> Finding:
        """The result, when everything has been seen."""
        if not self.faults:
            return Finding(self.name, True, self.passes())
        more = f" ({self.faults} faults in all)" if self.faults > 1 else ""
        return Finding(self.name, False, f"{self._first}{more}")


class TableCheck(Check, ABC):
    """A check that sees every row."""

    @abstractmethod
    def feed(self, table: pa.Table, shard: int) -> None:
        """Looks at the rows of shard number `shard`, of `rows.SCHEMA`; in order."""
