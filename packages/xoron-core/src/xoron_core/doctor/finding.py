"""What the doctor found: one fact, whether it is well, and the fix where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area: `plug-in`, `version`, `machine`, `kernel`, `model` or `live`.
        name: what was looked at, e.g. `llm`, `torch` or `image.encoder`.
        state: `ok`; `note` for what is absent or different and may stay so; `wrong` makes the
            command fail.
        detail: what was found.
        fix: what to do; never empty where the state is `wrong`.
    """

    area: str
    name: str
    state: State
    detail: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.state == "wrong" and not self.fix:
            raise ValueError(f"{self.area} {self.name}: a wrong finding needs a fix")

    @property
    def line(self) -> str:
        """The finding as one line, whatever line breaks an error message had."""
        return " ".join(f"{self.area} {self.name}: {self.detail}; {self.fix}".split())
