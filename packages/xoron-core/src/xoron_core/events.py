"""What a running model says, typed. `row` tells conversations of a batch apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TextDelta:
    """A piece of text; never a part of a character."""

    text: str
    row: int = 0


@dataclass(frozen=True)
class MediaOut:
    """A finished medium, as its component's `decode` or `sample` gives it."""

    modality: str
    media: Any
    row: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of a row.

    Attributes:
        reason: `stop` for an end token or stop string, `length` for the token limit.
        tokens: number of ids and queries generated.
    """

    reason: Literal["stop", "length"]
    tokens: int
    row: int = 0


Event = TextDelta | MediaOut | Finished
