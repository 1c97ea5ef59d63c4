"""Packs documents into rows of one fixed length, and rows into batches.

Shapes: B rows of a batch, N tokens of a row.

A document that does not fit goes on in the next row, as a document piece of its own: it gets a new
document id and its positions start at 0, because attention does not reach across rows. No token is
dropped or repeated, except what is left over at the very end. The first token of a piece has
nothing before it to be predicted from; with `bridge` the token before it stands there once more, so
that every token but a document's first is predicted exactly once. Evaluation uses that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Row(NamedTuple):
    """Attributes: tokens, documents (1.., 0 is padding) and positions, each (N,) int64."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


class Packer:
    """Cuts a stream of documents into rows.

    Args:
        length: N.
        bridge: whether a continued document repeats its last token at the start of the next row.
    """

    def __init__(self, length: int, *, bridge: bool = False) -> None:
        self.length = length
        self.bridge = bridge
        self._tokens = np.zeros(0, np.int64)
        self._first = np.zeros(0, bool)  # where a document starts

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Appends one document, (any length,) ids."""
        new = np.asarray(tokens, np.int64)
        if not len(new):
            return
        first = np.zeros(len(new), bool)
        first[0] = True
        self._tokens = np.concatenate([self._tokens, new])
        self._first = np.concatenate([self._first, first])

    @property
    def pending(self) -> int:
        """Tokens that are in no row yet."""
        return len(self._tokens)

    def pop(self) -> Row | None:
        """Returns the next full row, or None until more documents are added."""
        if len(self._tokens) < self.length:
            return None
        return self._cut(self.length)

    def drain(self) -> Iterator[Row]:
        """Yields all that is left; the last row may be padded."""
        while len(self._tokens):
            yield self._cut(min(self.length, len(self._tokens)))

    def state_dict(self) -> dict[str, Tensor]:
        """The tokens that are in no row yet, and which of them start a document."""
        return {
            "tokens": torch.from_numpy(self._tokens.copy()),
            "first": torch.from_numpy(self._first.astype(np.uint8)),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken."""
        self._tokens = state["tokens"].numpy().copy()
        self._first = state["first"].numpy().astype(bool)

    def _cut(self, size: int) -> Row:
        tokens, first = self._tokens[:size], self._first[:size].copy()
        first[0] = True
        goes_on = size < len(self._tokens) and not self._first[size]
        keep = size - 1 if self.bridge and goes_on else size
        self._tokens, self._first = self._tokens[keep:], self._first[keep:].copy()
        if keep < size:
            self._first[0] = False
        index = np.arange(size)
        starts = np.maximum.accumulate(np.where(first, index, 0))
        pad = (0, self.length - size)
        return Row(np.pad(tokens, pad), np.pad(np.cumsum(first), pad), np.pad(index - starts, pad))


def empty_row(length: int) -> Row:
    """Returns a row of nothing but padding, for ranks that have run out of rows."""
    zeros = np.zeros(length, np.int64)
    return Row(zeros, zeros, zeros)


def collate(rows: Sequence[Row], *, pad_token_id: int) -> dict[str, Tensor]:
    """Stacks rows to the batch that a model takes: int64 tensors (B, N).

    Labels stand at the positions of their tokens; the model shifts them and never predicts a
    document's first. Padding has the label -100.
    """
    documents = torch.from_numpy(np.stack([row.documents for row in rows]))
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    real = documents > 0
    return {
        "input_ids": tokens.masked_fill(~real, pad_token_id),
        "labels": tokens.masked_fill(~real, -100),
        "document_ids": documents,
        "position_ids": torch.from_numpy(np.stack([row.positions for row in rows])),
        "attention_mask": real.to(torch.int64),
    }
