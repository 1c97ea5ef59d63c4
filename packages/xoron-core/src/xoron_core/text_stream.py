"""Ids to shown text, piece by piece: whole characters, no special tokens, no hidden blocks, and
nothing that a stop string will take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xoron_core.tokens.stream import StreamDecoder

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor


class TextStream:
    """One row's text.

    Args:
        processor: for the tokenizer and the hidden pairs.
        stop: strings that end the text and are not part of it.
        show_hidden: whether hidden blocks are shown.
    """

    def __init__(
        self, processor: XoronProcessor, stop: Sequence[str] = (), show_hidden: bool = False
    ) -> None:
        self._decoder = StreamDecoder(processor.tokenizer)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._specials: set[int] = set()
        self._hides: dict[int, int] = {}
        self._until: int | None = None
        if processor.space is not None:
            self._specials = {special.id for special in processor.space}
            if not show_hidden:
                pairs = processor.space.pairs()
                self._hides = {
                    special.id: processor.space.id_of(pairs[special.string])
                    for special in processor.space
                    if special.hidden and special.string in pairs
                }

    def push(self, token: int) -> tuple[str, bool]:
        """Takes one id; returns the text that is now certain, and whether a stop string came."""
        if self._until is not None:
            self._until = None if token == self._until else self._until
            return "", False
        if token in self._specials:
            self._until = self._hides.get(token)
            return "", False
        self._held += self._decoder.push(token)
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                text, self._held = self._held[:at], ""
                return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text, False

    def flush(self) -> str:
        """The rest, once no more ids come."""
        text = self._held + self._decoder.flush()
        self._held = ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
