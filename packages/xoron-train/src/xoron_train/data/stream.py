"""The training stream: a mixture of text and conversations, as global rows.

Every process walks the same stream and takes its own rows of each optimizer step's window, so that
which row is trained in which step depends neither on the number of processes nor on how the window
is cut into micro-batches. It costs each process the tokenisation of the whole window, and the
reading of its media.

Text is packed into rows of one length (`text_rows`); a conversation is a row of its own. Between
text as a whole and each source of conversations the mixture holds the shares of *positions*, as it
does within text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xoron_core.errors import ConfigError
from xoron_train.data.cursor import Cursor, held_out_documents
from xoron_train.data.packing import Packer, Row
from xoron_train.data.sources import Document, IndexedSource, open_source
from xoron_train.data.talks import Talk
from xoron_train.data.text_rows import StreamState, TextRows, furthest_behind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xoron_train.recipe import Recipe


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

    Args:
        recipe: its mixture, seed, split, row length and shuffling are used.
        tokenize: text to the ids of a document; None where the mixture holds no text.
        talks: the mixture's sources of conversations, read for training.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenize: DocumentTokens | None,
        *,
        talks: Mapping[str, IndexedSource[Talk]] | None = None,
    ) -> None:
        weights = {name: config.weight for name, config in recipe.mixture.items()}
        texts = [n for n, config in recipe.mixture.items() if not config.holds_conversations]
        self.texts = {name: _cursor(recipe, name) for name in texts}
        self.talks = {
            name: Cursor(
                source,
                seed=recipe.seed,
                eval_fraction=recipe.eval_fraction,
                max_unreadable=recipe.max_unreadable,
            )
            for name, source in (talks or {}).items()
        }
        self.text_rows = TextRows(
            self.texts,
            weights={name: weights[name] for name in texts},
            tokenize=tokenize,
            length=recipe.sequence_length,
            shuffle_rows=recipe.shuffle_rows,
            seed=recipe.seed,
        )
        # Text as a whole stands under the empty name, which no source can have.
        self.weights = {name: weights[name] for name in self.talks}
        if texts:
            self.weights = {"": sum(weights[name] for name in texts), **self.weights}
        self.positions = dict.fromkeys(self.weights, 0)

    @property
    def cursors(self) -> dict[str, Cursor[Any]]:
        """The walk over each source."""
        return {**self.texts, **self.talks}

    @property
    def drawn(self) -> dict[str, int]:
        """Tokens or positions taken from each source."""
        return {**self.text_rows.drawn, **{name: self.positions[name] for name in self.talks}}

    def check(self) -> None:
        """Reads one training item of each source, without moving the stream.

        Raises:
            DataError: if there is none.
        """
        for cursor in self.cursors.values():
            cursor.fresh().next()

    def rows(self, count: int) -> list[Row | Talk]:
        """Returns the next `count` rows.

        Raises:
            DataError: if a source has nothing to train on, or too much that is unreadable.
        """
        return [self._row() for _ in range(count)]

    def state_dict(self) -> StreamState:
        """Everything that decides the rows to come."""
        text = self.text_rows.state_dict()
        data = {
            "sources": {name: cursor.state_dict() for name, cursor in self.cursors.items()},
            "positions": dict(self.positions),
            **text.data,
        }
        return StreamState(data, text.tensors)

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: if a source's documents have changed.
        """
        for name, cursor in self.cursors.items():
            cursor.load_state_dict(state.data["sources"][name])
        self.positions = dict(state.data["positions"])
        self.text_rows.load_state_dict(state)

    def _row(self) -> Row | Talk:
        name = furthest_behind(self.positions, self.weights)
        row: Row | Talk = self.talks[name].next() if name else self.text_rows.rows(1)[0]
        self.positions[name] += row_length(row)
        return row


def row_length(row: Row | Talk) -> int:
    """Positions that a row takes, padding included; media, where it holds media alone."""
    if isinstance(row, Row):
        return len(row.tokens)
    if row.media:
        return len(next(iter(row.media.values())))
    assert row.plan is not None
    return len(row.plan.input_ids)


def _cursor(recipe: Recipe, source: str) -> Cursor[Document]:
    return Cursor(
        open_source(source, recipe.mixture[source]),
        seed=recipe.seed,
        eval_fraction=recipe.eval_fraction,
        max_unreadable=recipe.max_unreadable,
    )


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
