"""Ids to shown text, piece by piece: whole characters, no special tokens, no hidden blocks unless
they are wanted, and nothing that a stop string will take back.

A hidden block (reasoning) that the prompt opened is open for the answer too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from xoron_core.tokens.stream import StreamDecoder

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor

Piece = tuple[str, bool]


class TextStream:
    """One row's text. A piece is a non-empty text and whether it stands in a hidden block.

    Args:
        processor: for the tokenizer and the hidden pairs.
        stop: strings that end the answer and are not part of it; they mean nothing inside hidden
            blocks, so that showing a block does not change what is said.
        show_hidden: whether hidden blocks are given.
        prompt: the ids before the answer.
    """

    def __init__(
        self,
        processor: XoronProcessor,
        stop: Sequence[str] = (),
        show_hidden: bool = False,
        prompt: Iterable[int] = (),
    ) -> None:
        self._decoder = StreamDecoder(processor.tokenizer)
        self._stop = tuple(s for s in stop if s)
        self._show_hidden = show_hidden
        self._held = ""
        self._specials: set[int] = set()
        self._hides: dict[int, int] = {}
        self._until: int | None = None
        if processor.space is not None:
            self._specials = {special.id for special in processor.space}
            pairs = processor.space.pairs()
            self._hides = {
                special.id: processor.space.id_of(pairs[special.string])
                for special in processor.space
                if special.hidden and special.string in pairs
            }
        for token in prompt:
            self._enter(token)

    @property
    def hidden(self) -> bool:
        """Whether a hidden block is open."""
        return self._until is not None

    def push(self, token: int) -> tuple[list[Piece], bool]:
        """Takes one id; returns the pieces that are now certain, and whether a stop string came."""
        if token in self._specials:
            edge = token == self._until if self.hidden else token in self._hides
            pieces = self.flush() if edge else []
            self._enter(token)
            return pieces, False
        self._held += self._decoder.push(token)
        if self.hidden:
            return self._release(len(self._held)), False
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                pieces = self._release(at)
                self._held = ""
                return pieces, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return self._release(len(self._held) - keep), False

    def flush(self) -> list[Piece]:
        """The rest, once no more ids come."""
        self._held += self._decoder.flush()
        return self._release(len(self._held))

    def _enter(self, token: int) -> None:
        """Opens or closes a hidden block."""
        if self._until is None:
            self._until = self._hides.get(token)
        elif token == self._until:
            self._until = None

    def _release(self, length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        return [(text, self.hidden)] if text and (self._show_hidden or not self.hidden) else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
