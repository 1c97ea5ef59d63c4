"""Walks over the training items of one source, shuffled anew in every epoch, for ever.

An item is a text document or a conversation.

The whole state is the epoch, a position in its order and the counts of items that could not be
used, so that a resumed walk goes on with exactly the item that would have come next. Held-out items
are passed over; unreadable ones are counted and named, and too many stop the run.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from xoron_core.errors import DataError
from xoron_train.conversation import HELD_OUT, TRAIN
from xoron_train.data.order import permutation
from xoron_train.data.sources import (
    EMPTY,
    IndexedSource,
    Item,
    StreamedSource,
    UnreadableError,
)

T = TypeVar("T", bound=Item)

logger = logging.getLogger("xoron.train")

# A stream's total is not known, and fewer documents than this say nothing about a share.
_SMALLEST_SAMPLE = 100


class Unreadable:
    """The documents of one source that could not be read, by name.

    Args:
        source: name of the source.
        limit: largest share that is tolerated.
    """

    def __init__(self, source: str, limit: float) -> None:
        self.source = source
        self.limit = limit
        self.names: dict[str, str] = {}

    def note(self, error: UnreadableError, documents: int) -> None:
        """Counts one of `documents` documents.

        Raises:
            DataError: if they have become too many.
        """
        if error.name not in self.names:
            self.names[error.name] = error.reason
            logger.warning("mixture.%s: left out %s: %s", self.source, error.name, error.reason)
        if len(self.names) > self.limit * documents:
            shown = "; ".join(f"{n}: {why}" for n, why in itertools.islice(self.names.items(), 3))
            raise DataError(
                f"mixture.{self.source}: {len(self.names)} of {documents} documents are unreadable,"
                f" more than the share max_unreadable={self.limit} allows. First: {shown}."
                " Mend or exclude them, or raise max_unreadable."
            )


class Cursor(Generic[T]):
    """An endless walk over one source's training items.

    Args:
        source: indexed or streamed.
        seed: of the order.
        eval_fraction: share of documents that is held out and passed over.
        max_unreadable: share of unreadable documents that is tolerated.
    """

    def __init__(
        self,
        source: IndexedSource[T] | StreamedSource[T],
        *,
        seed: int,
        eval_fraction: float,
        max_unreadable: float,
    ) -> None:
        self.source = source
        self.seed = seed
        self.eval_fraction = eval_fraction
        self.unreadable = Unreadable(source.name, max_unreadable)
        self.passed: dict[str, int] = {}  # how many were not for training, by what they were
        self.epoch = 0
        self.position = 0
        self._walk: Iterator[T | UnreadableError] | None = None
        self._used = 0  # items of this epoch that were handed out

    def next(self) -> T:
        """Returns the next training item.

        Raises:
            DataError: if an epoch brings none, or too many are unreadable.
        """
        while True:
            if self._walk is None:
                self._walk = self._documents()
            item = next(self._walk, None)
            if item is None:
                self._end_epoch()
                continue
            self.position += 1
            if isinstance(item, UnreadableError):
                self.unreadable.note(item, self._documents_seen())
            elif (side := item.side(self.eval_fraction)) != TRAIN:
                self.passed[side] = self.passed.get(side, 0) + 1
            else:
                self._used += 1
                return item

    def fresh(self) -> Cursor[T]:
        """Returns a cursor over the same source, at its start."""
        return Cursor(
            self.source,
            seed=self.seed,
            eval_fraction=self.eval_fraction,
            max_unreadable=self.unreadable.limit,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data that `load_state_dict` takes."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "used": self._used,
            "passed": dict(self.passed),
            "unreadable": dict(self.unreadable.names),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: if the source's documents are no longer the same.
        """
        if state["fingerprint"] != self._fingerprint():
            raise DataError(
                f"mixture.{self.source.name}: its documents have changed since the checkpoint"
                f" ({state['fingerprint']} then, {self._fingerprint()} now), so the run cannot go"
                " on exactly; restore them, or start a new run"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._used, self.passed = state["used"], dict(state["passed"])
        self.unreadable.names = dict(state["unreadable"])
        self._walk = None

    def _documents(self) -> Iterator[T | UnreadableError]:
        """This epoch's items from `position` on."""
        if isinstance(self.source, StreamedSource):
            yield from self._blocks(self.source)
            return
        order = permutation(len(self.source), self.seed, self.source.name, self.epoch)
        yield from self.source.walk(order[self.position :].tolist())

    def _blocks(self, source: StreamedSource[T]) -> Iterator[T | UnreadableError]:
        """The same for a stream, whose blocks are shuffled each in itself."""
        size = source.block_size
        block, done = divmod(self.position, size)
        rows = source.read_from(block * size)
        while items := list(itertools.islice(rows, size)):
            order = permutation(len(items), self.seed, source.name, self.epoch, block)
            for index in order[done:].tolist():
                yield items[index]
            block, done = block + 1, 0

    def _end_epoch(self) -> None:
        if not self._used:
            passed = "".join(f", {count} {why}" for why, count in sorted(self.passed.items()))
            raise DataError(
                f"mixture.{self.source.name}: no training document among {self.position}"
                f" ({len(self.unreadable.names)} unreadable{passed}; eval_fraction is"
                f" {self.eval_fraction}); add data or lower eval_fraction"
            )
        apart = {why: n for why, n in self.passed.items() if why not in (EMPTY, HELD_OUT)}
        if apart and not self.epoch:
            logger.info("mixture.%s: of %d, left out: %s", self.source.name, self.position, apart)
        self.epoch, self.position, self._used, self._walk = self.epoch + 1, 0, 0, None

    def _documents_seen(self) -> int:
        if isinstance(self.source, IndexedSource):
            return len(self.source)
        return max(self.position, _SMALLEST_SAMPLE)

    def _fingerprint(self) -> str:
        return self.source.fingerprint() if isinstance(self.source, IndexedSource) else "streamed"


def held_out_documents(
    source: IndexedSource[T] | StreamedSource[T],
    *,
    eval_fraction: float,
    max_unreadable: float,
    side: str = HELD_OUT,
) -> Iterator[T]:
    """Yields the held-out items, or those of another side, in an order that no seed changes.

    Raises:
        DataError: if too many are unreadable.
    """
    unreadable = Unreadable(source.name, max_unreadable)
    if isinstance(source, IndexedSource):
        total = len(source)
        walk = source.walk(permutation(total, source.name, "held out").tolist())
    else:
        total, walk = 0, source.read_from(0)
    for seen, item in enumerate(walk, 1):
        if isinstance(item, UnreadableError):
            unreadable.note(item, total or max(seen, _SMALLEST_SAMPLE))
        elif item.side(eval_fraction) == side:
            yield item
