"""The checks that read rows alone: shapes, ids, grammar, splits, lengths, duplicates.

Each judges one thing and leaves what another one judges to that: ids out of range are no fault of
the grammar.

Shapes: n ids of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from xoron_core.errors import SequenceError
from xoron_core.pieces import CodedPiece, PlaceholderPiece, SpanGrammar
from xoron_core.tokens.space import TokenSpace
from xoron_train.shards.findings import Finding, TableCheck
from xoron_train.shards.tokenize import side


class _View(NamedTuple):
    """A row as checks read it: its name, its (n,) ids, and its columns."""

    name: str
    ids: np.ndarray
    row: dict[str, Any]


class Shapes(TableCheck):
    """`learned` is as long as the ids; spans and labels lie inside them, in order."""

    name = "shapes"

    def feed(self, table: pa.Table, shard: int) -> None:
        lengths, learned = _lengths(table, "input_ids"), _lengths(table, "learned")
        for view, n, flags in zip(_views(table), lengths, learned, strict=True):
            if flags != n:
                self.fault(view.name, f"has {n} ids but {flags} flags of what is learned")
            stop = 0
            for span in view.row["spans"]:
                start, length = span["start"], span["length"]
                if start < stop or length < 1 or start + length > n:
                    self.fault(
                        view.name, f"has a span of {length} at {start} among {n} ids behind {stop}"
                    )
                stop = start + length
            places = [label["position"] for label in view.row["media_labels"]]
            if wrong := [place for place in places if not 0 <= place < n]:
                self.fault(view.name, f"has a label at position {wrong[0]} of {n}")


class Ids(TableCheck):
    """Every id is a live one of the token space."""

    name = "ids"

    def __init__(self, space: TokenSpace) -> None:
        super().__init__()
        self.live = live_ids(space)

    def feed(self, table: pa.Table, shard: int) -> None:
        for view in _views(table):
            labels = [label["id"] for label in view.row["media_labels"]]
            for kind, ids in (("id", view.ids), ("label", np.array(labels, np.int64))):
                wrong = ids[~in_range(ids, self.live)]
                if len(wrong):
                    self.fault(
                        view.name,
                        f"{kind} {wrong[0]} is none of the {len(self.live)} rows of the token"
                        " space, or a hole of it",
                    )


class Grammar(TableCheck):
    """Every row parses, and its media stand where its spans say, made or shown as they say."""

    name = "grammar"

    def __init__(self, grammar: SpanGrammar) -> None:
        super().__init__()
        self.grammar = grammar
        self.live = live_ids(grammar.space)

    def feed(self, table: pa.Table, shard: int) -> None:
        for view in _views(table):
            if not in_range(view.ids, self.live).all():
                continue
            try:
                found = self._spans(view.ids)
            except SequenceError as error:
                self.fault(view.name, str(error))
                continue
            keys = ("codec", "start", "length", "made")
            said = [tuple(span[key] for key in keys) for span in view.row["spans"]]
            if found != said:
                self.fault(view.name, f"its ids hold the spans {found}, its table says {said}")

    def _spans(self, ids: np.ndarray) -> list[tuple[str, int, int, bool]]:
        """Codec, start, length and direction of every coded span."""
        spans, position = [], 0
        for piece in self.grammar.parse(torch.from_numpy(ids.astype(np.int64))):
            if isinstance(piece, PlaceholderPiece):
                raise SequenceError(
                    f"position {position}: places for features of {piece.modality}, which are no"
                    " ids"
                )
            if isinstance(piece, CodedPiece):
                length = piece.codes.numel()
                spans.append((piece.codec, position + 1, length, piece.made))
                position += length + 2
            else:
                position += len(piece.ids)
        return spans


class Splits(TableCheck):
    """No medium, and no text of a conversation without media, is in two splits."""

    name = "splits"

    def __init__(self, eval_fraction: float | None) -> None:
        super().__init__()
        self.eval_fraction = eval_fraction
        self.seen: dict[str, str] = {}

    def feed(self, table: pa.Table, shard: int) -> None:
        for view in _views(table):
            split, media = view.row["split"], {span["medium"] for span in view.row["spans"]}
            digests = {*view.row["digests"], *media}
            for digest in sorted(digests):
                if (other := self.seen.setdefault(digest, split)) != split:
                    self.fault(view.name, f"medium {digest} is in {split!r} and in {other!r}")
            if self.eval_fraction is None:
                continue
            expected = side(frozenset(map(bytes.fromhex, digests)), self.eval_fraction)
            if expected != split and all(self.seen[digest] == split for digest in digests):
                self.fault(view.name, f"is in {split!r}, its media say {expected!r}")

    def passes(self) -> str:
        return f"{len(self.seen)} media and texts, none in two splits"


class Lengths(TableCheck):
    """No row is empty or longer than was declared."""

    name = "lengths"

    def __init__(self, max_length: int | None) -> None:
        super().__init__()
        self.max_length = max_length
        self.lengths: list[int] = []

    def feed(self, table: pa.Table, shard: int) -> None:
        lengths = _lengths(table, "input_ids")
        self.lengths += lengths
        for name, n in zip(table["name"].to_pylist(), lengths, strict=True):
            if not n:
                self.fault(name, "has no id")
            elif self.max_length is not None and n > self.max_length:
                self.fault(name, f"takes {n} positions, more than {self.max_length}")

    def passes(self) -> str:
        if not self.lengths:
            return "no row"
        quantiles = np.percentile(self.lengths, [0, 50, 99, 100]).astype(int)
        least, middle, high, most = quantiles.tolist()
        mean = f"mean {np.mean(self.lengths):.1f}"
        return f"{least} to {most} positions, median {middle}, {mean}, 99 % up to {high}"


class Duplicates(TableCheck):
    """Few rows have the ids of an earlier one."""

    name = "duplicates"

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.seen: dict[bytes, str] = {}
        self.rows = self.again = 0
        self.example = ""

    def feed(self, table: pa.Table, shard: int) -> None:
        for view in _views(table):
            self.rows += 1
            digest = hashlib.blake2b(view.ids.tobytes(), digest_size=16).digest()
            if (first := self.seen.setdefault(digest, view.name)) != view.name:
                self.again += 1
                self.example = self.example or f"{view.name} has the ids of {first}"

    def passes(self) -> str:
        share = self.again / max(1, self.rows)
        return f"{self.again} of {self.rows} rows ({share:.2%}, up to {self.limit:.2%} allowed)"

    def finding(self) -> Finding:
        if self.again > self.limit * self.rows:
            return Finding(self.name, False, f"{self.passes()}; first: {self.example}")
        return Finding(self.name, True, self.passes())


def live_ids(space: TokenSpace) -> np.ndarray:
    """(R,) bool: which rows of the space mean something."""
    live = space.allowed(codecs=[entry.range.name for entry in space.codecs if not entry.removed])
    live[[special.id for special in space]] = True
    return live.numpy()


def in_range(ids: np.ndarray, live: np.ndarray) -> np.ndarray:
    """(n,) bool: which ids are live."""
    inside = (ids >= 0) & (ids < len(live))
    return inside & live[np.where(inside, ids, 0)]


def _lengths(table: pa.Table, column: str) -> list[int]:
    return pc.list_value_length(table[column]).to_pylist()


def _views(table: pa.Table) -> Iterator[_View]:
    """The rows of a shard, their ids as arrays."""
    ids = table["input_ids"]
    small = table.drop_columns(["input_ids", "learned"]).to_pylist()
    for index, row in enumerate(small):
        yield _View(row["name"], ids[index].values.to_numpy(), row)
