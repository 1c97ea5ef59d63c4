"""The text of a mixture: documents of several sources, tokenised, packed into rows and shuffled.

The mixture holds the shares of *tokens*: the next document comes from the source that is furthest
behind its weight. No random choice is involved, so there is no sampling state to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xoron_train.data.cursor import Cursor
from xoron_train.data.order import permutation
from xoron_train.data.packing import Packer, Row
from xoron_train.data.sources import Document


class StreamState(NamedTuple):
    """Attributes: data, plain and JSON-able; tensors, by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]


class TextRows:
    """Endless packed rows of text.

    Rows are shuffled in blocks of `shuffle_rows`: a long document fills many rows in sequence, and
    they would otherwise make up whole optimizer steps.

    Args:
        cursors: a walk over each source.
        weights: the share of each, by the same names.
        tokenize: text to the ids of a document; None without cursors.
        length: tokens of a row.
        shuffle_rows: rows of a block.
        seed: of the shuffling.
    """

    def __init__(
        self,
        cursors: Mapping[str, Cursor[Document]],
        *,
        weights: Mapping[str, float],
        tokenize: Callable[[str], list[int]] | None,
        length: int,
        shuffle_rows: int,
        seed: int,
    ) -> None:
        self.cursors = cursors
        self.weights = weights
        self.tokenize = tokenize
        self.drawn = dict.fromkeys(cursors, 0)  # tokens taken from each source
        self.packer = Packer(length)
        self.seed = seed
        self.shuffle_rows = shuffle_rows
        self.blocks = 0  # blocks packed so far
        self.block: list[Row] = []  # rows of the current one that are still to come

    def rows(self, count: int) -> list[Row]:
        """Returns the next `count` rows.

        Raises:
            DataError: if a source has no training document, or too many unreadable ones.
        """
        rows: list[Row] = []
        while len(rows) < count:
            if not self.block:
                self._pack_block()
            taken = min(len(self.block), count - len(rows))
            rows += self.block[:taken]
            self.block = self.block[taken:]
        return rows

    def state_dict(self) -> StreamState:
        """Everything that decides the rows to come, but for the cursors."""
        data = {"drawn": dict(self.drawn), "blocks": self.blocks}
        return StreamState(data, {**self.packer.state_dict(), **_stack(self.block)})

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state_dict` was taken."""
        self.drawn = dict(state.data["drawn"])
        self.blocks = state.data["blocks"]
        self.block = _unstack(state.tensors)
        self.packer.load_state_dict(state.tensors)

    def _pack_block(self) -> None:
        rows: list[Row] = []
        while len(rows) < self.shuffle_rows:
            row = self.packer.pop()
            if row is None:
                self._draw()
            else:
                rows.append(row)
        order = permutation(len(rows), self.seed, "rows", self.blocks)
        self.block = [rows[index] for index in order.tolist()]
        self.blocks += 1

    def _draw(self) -> None:
        assert self.tokenize is not None
        name = furthest_behind(self.drawn, self.weights)
        tokens = self.tokenize(self.cursors[name].next().text)
        self.drawn[name] += len(tokens)
        self.packer.add(tokens)


def furthest_behind(drawn: Mapping[str, int], weights: Mapping[str, float]) -> str:
    """The name whose share of what was drawn is furthest below its weight; the first of equals."""
    whole, total = sum(weights.values()), sum(drawn.values())
    return max(drawn, key=lambda name: weights[name] / whole * total - drawn[name])


def _stack(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as tensors (rows, N), int32 to keep checkpoints small."""
    columns = zip(*rows, strict=True) if rows else [[]] * len(Row._fields)
    return {
        f"block.{name}": torch.from_numpy(np.array(column, np.int32))
        for name, column in zip(Row._fields, columns, strict=True)
    }


def _unstack(tensors: dict[str, Tensor]) -> list[Row]:
    columns = [tensors[f"block.{name}"].numpy().astype(np.int64) for name in Row._fields]
    return [Row(*arrays) for arrays in zip(*columns, strict=True)]
