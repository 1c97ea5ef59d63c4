"""Ids to text while they are generated, never a half character.

For a byte-level tokenizer the pieces joined equal `tokenizer.decode` of all ids, for any ids. For
others (SentencePiece with byte fallback) a window of ids is decoded again at each step, because a
piece's text depends on its left neighbour.
"""

from __future__ import annotations

import codecs
from functools import cache
from typing import cast
from weakref import WeakKeyDictionary

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from xoron_core.tokens.byte_level import byte_alphabet


class StreamDecoder:
    """An incremental detokeniser for one sequence.

    Args:
        tokenizer: a fast tokenizer.
        skip_special_tokens: whether special tokens give no text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._skip = skip_special_tokens
        self._special = _special_ids(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Takes the next id; returns the text that it completes, possibly none.

        Bytes that begin a character are held back until it is complete or known to be invalid.
        """
        if not self._byte_level:
            return self._push_window(token_id)
        token = self._backend.id_to_token(token_id)
        if token is None or (self._skip and token_id in self._special):
            return ""
        table = _bytes_of_characters()
        # As in the tokenizers library: a token with any other character stands for itself.
        known = all(character in table for character in token)
        return self._decoder.decode(
            bytes(table[c] for c in token) if known else token.encode("utf-8")
        )

    def flush(self) -> str:
        """Ends the sequence: returns what was held back, an unfinished character as U+FFFD."""
        if self._byte_level:
            text = self._decoder.decode(b"", final=True)
            self._decoder.reset()
            return text
        text = self._text(self._window)[len(self._text(self._window[: self._shown])) :]
        self._window, self._shown = [], 0
        return text

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._text(self._window[: self._shown])
        now = self._text(self._window)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        # The shown part stays one step as context: it decides about a leading space.
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=self._skip))


_SPECIAL: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    if tokenizer not in _SPECIAL:
        added = tokenizer.added_tokens_decoder.items()
        _SPECIAL[tokenizer] = frozenset(number for number, token in added if token.special)
    return _SPECIAL[tokenizer]


@cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: value for value, character in byte_alphabet().items()}
