"""A conversation to learn from or be judged on: messages with their media. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TRAIN = "train"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        name: what it is reported under.
        messages: Hugging Face chat messages; a medium is whatever its modality loads (a path,
            bytes, an array). What the assistant says is what is learned, or expected; a medium of
            the user may have `labels`, a word for each of its positions.
        kind: of question, for scores by kind; may be empty.
    """

    name: str
    messages: Sequence[dict[str, Any]]
    kind: str = ""


def has_media(message: Mapping[str, Any]) -> bool:
    """Whether a message holds anything but text."""
    content = message.get("content")
    return isinstance(content, list) and any(
        not isinstance(part, str) and part.get("type") != "text" for part in content
    )


class Conversations(Protocol):
    """One split of a data set: its conversations by index, the same for the same index."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Conversation:
        """One of them, made or read when it is asked for."""
