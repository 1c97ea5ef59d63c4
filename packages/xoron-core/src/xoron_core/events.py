"""What a running model says, typed. `row` tells conversations of a batch apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TextDelta:
    """A piece of text; never a part of a character.

    Attributes:
        hidden: whether it stands in a hidden block such as reasoning; such pieces come only with
            `show_hidden`.
    """

    text: str
    row: int = 0
    hidden: bool = False


@dataclass(frozen=True)
class TokenInfo:
    """How sure the model was of an id it chose; comes before the text of that id.

    Both numbers are of the model's own distribution over the ids that were allowed there, before
    repetition penalty, temperature and truncation.

    Attributes:
        id: the chosen id.
        logprob: its log-probability in nats, 0 or less.
        entropy: of the distribution, in nats, 0 or more.
        answer: whether it counts for the answer's confidence: text or an end, not in a hidden
            block, and not the only id that was allowed.
    """

    id: int
    logprob: float
    entropy: float
    answer: bool = True
    row: int = 0


@dataclass(frozen=True)
class MediaOut:
    """A finished medium, as its component's `decode` or `sample` gives it."""

    modality: str
    media: Any
    row: int = 0


@dataclass(frozen=True)
class Usage:
    """What the batch has cost until this row ended, counted where it happens.

    Attributes:
        positions: positions that went through the model, over all rows, padding included.
        reused: positions whose cache was taken over instead, over all rows.
        steps: forward passes of the model.
        drafted: ids that the draft model proposed for this row.
        accepted: those of them that the model agreed to.
    """

    positions: int = 0
    reused: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted ids that were accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True)
class Finished:
    """The end of a row.

    Attributes:
        reason: `stop` for an end token or stop string, `length` for the token limit.
        tokens: number of ids and queries generated.
        confidence: geometric mean probability of the answer's ids, in (0, 1]; None unless
            details were asked for, or without any such id.
        usage: what it took.
    """

    reason: Literal["stop", "length"]
    tokens: int
    row: int = 0
    confidence: float | None = None
    usage: Usage = field(default_factory=Usage)


Event = TextDelta | TokenInfo | MediaOut | Finished
