"""The training stream: a mixture of sources, tokenised and packed into global rows.

Every process walks the same stream and takes its own rows of each optimizer step's window, so that
which row is trained in which step depends neither on the number of processes nor on how the window
is cut into micro-batches. It costs each process the tokenisation of the whole window.

The mixture holds the shares of *tokens*: the next document comes from the source that is furthest
behind its weight. No random choice is involved, so there is no sampling state to restore.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xoron_core.errors import ConfigError
from xoron_train.data.cursor import Cursor, held_out_documents
from xoron_train.data.order import permutation
from xoron_train.data.packing import Packer, Row
from xoron_train.data.sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xoron_train.recipe import Recipe


class StreamState(NamedTuple):
    """Attributes: data, plain and JSON-able; tensors, by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]


class DocumentTokens:
    """Turns a text into the ids of one document: BOS, the text, EOS.

    BOS is left out where the tokenizer has none. Text that looks like a special token stays text.

    Raises:
        ConfigError: if the tokenizer has no EOS, without which documents would run together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the model's tokenizer has no end-of-sequence token, so documents cannot be told"
                " apart; compose with tokens.template: xoron"
            )
        self.tokenizer = tokenizer
        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end = [tokenizer.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        from xoron_core.tokens.tokenizer import encode_text

        return [*self.begin, *encode_text(self.tokenizer, text), *self.end]


class TrainStream:
    """Endless rows of a recipe's training mixture.

    Rows are shuffled in blocks of `shuffle_rows`: a long document fills many rows in sequence, and
    they would otherwise make up whole optimizer steps.

    Args:
        recipe: its mixture, seed, split, row length and shuffling are used.
        tokenize: text to the ids of a document.
    """

    def __init__(self, recipe: Recipe, tokenize: DocumentTokens) -> None:
        self.tokenize = tokenize
        self.weights = {name: config.weight for name, config in recipe.mixture.items()}
        self.cursors = {name: _cursor(recipe, name) for name in recipe.mixture}
        self.drawn = dict.fromkeys(self.cursors, 0)  # tokens taken from each source
        self.packer = Packer(recipe.sequence_length)
        self.seed = recipe.seed
        self.shuffle_rows = recipe.shuffle_rows
        self.blocks = 0  # blocks packed so far
        self.block: list[Row] = []  # rows of the current one that are still to come

    def check(self) -> None:
        """Reads one training document of each source, without moving the stream.

        Raises:
            DataError: if there is none.
        """
        for cursor in self.cursors.values():
            cursor.fresh().next()

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
        """Everything that decides the rows to come."""
        data = {
            "sources": {name: cursor.state_dict() for name, cursor in self.cursors.items()},
            "drawn": dict(self.drawn),
            "blocks": self.blocks,
        }
        return StreamState(data, {**self.packer.state_dict(), **_stack(self.block)})

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: if a source's documents have changed.
        """
        for name, cursor in self.cursors.items():
            cursor.load_state_dict(state.data["sources"][name])
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
        name = max(self.cursors, key=self._deficit)
        tokens = self.tokenize(self.cursors[name].next().text)
        self.drawn[name] += len(tokens)
        self.packer.add(tokens)

    def _deficit(self, name: str) -> float:
        share = self.weights[name] / sum(self.weights.values())
        return share * sum(self.drawn.values()) - self.drawn[name]


def _cursor(recipe: Recipe, source: str) -> Cursor:
    return Cursor(
        open_source(source, recipe.mixture[source]),
        seed=recipe.seed,
        eval_fraction=recipe.eval_fraction,
        max_unreadable=recipe.max_unreadable,
    )


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


def held_out_rows(
    recipe: Recipe, source: str, tokenize: DocumentTokens, *, limit: int | None
) -> list[Row]:
    """Packs held-out documents of one source, at most `limit` rows of them.

    Every token but each document's first is a label exactly once.
    """
    packer = Packer(recipe.sequence_length, bridge=True)
    rows: list[Row] = []
    for text in held_out_texts(recipe, source):
        packer.add(tokenize(text))
        while (row := packer.pop()) is not None:
            rows.append(row)
            if len(rows) == limit:
                return rows
    return [*rows, *packer.drain()][:limit]


def held_out_texts(recipe: Recipe, source: str) -> Iterator[str]:
    """Yields the texts of one source that a recipe holds out."""
    documents = held_out_documents(
        open_source(source, recipe.mixture[source]),
        eval_fraction=recipe.eval_fraction,
        max_unreadable=recipe.max_unreadable,
    )
    for document in documents:
        yield document.text


def training_texts(recipe: Recipe, source: str) -> Iterator[str]:
    """Yields every training text of one source once, in the order of the first epoch."""
    cursor = _cursor(recipe, source)
    while True:
        document = cursor.next()
        if cursor.epoch:
            return
        yield document.text


def token_bytes(tokenizer: PreTrainedTokenizerFast, size: int) -> Tensor | None:
    """Returns the number of UTF-8 bytes of every text token, (size,) int64; 0 for special tokens.

    None if the tokenizer is not byte-level, so that a token's bytes are not a fixed number.
    """
    import json

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return None
    alphabet = set(bytes_to_unicode().values())
    special = set(tokenizer.added_tokens_decoder)
    counts = torch.zeros(size, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if index < size and index not in special and alphabet.issuperset(token):
            counts[index] = len(token)
    return counts
