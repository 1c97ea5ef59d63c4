"""Walks over the training documents of one source, shuffled anew in every epoch, for ever.

The whole state is the epoch, a position in its order and the count of documents that could not be
used, so that a resumed walk goes on with exactly the document that would have come next. Held-out
documents are passed over; unreadable ones are counted and named, and too many stop the run.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from xoron_core.errors import DataError
from xoron_train.data.order import held_out, permutation
from xoron_train.data.sources import Document, IndexedSource, StreamedSource, UnreadableError

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


class Cursor:
    """An endless walk over one source's training documents.

    Args:
        source: indexed or streamed.
        seed: of the order.
        eval_fraction: share of documents that is held out and passed over.
        max_unreadable: share of unreadable documents that is tolerated.
    """

    def __init__(
        self,
        source: IndexedSource | StreamedSource,
        *,
        seed: int,
        eval_fraction: float,
        max_unreadable: float,
    ) -> None:
        self.source = source
        self.seed = seed
        self.eval_fraction = eval_fraction
        self.unreadable = Unreadable(source.name, max_unreadable)
        self.empty = 0
        self.epoch = 0
        self.position = 0
        self._walk: Iterator[Document | UnreadableError] | None = None
        self._used = 0  # documents of this epoch that were handed out

    def next(self) -> Document:
        """Returns the next training document.

        Raises:
            DataError: if an epoch brings no document, or too many are unreadable.
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
            elif not item.text:
                self.empty += 1
            elif not held_out(item.text, self.eval_fraction):
                self._used += 1
                return item

    def fresh(self) -> Cursor:
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
            "empty": self.empty,
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
        self._used, self.empty = state["used"], state["empty"]
        self.unreadable.names = dict(state["unreadable"])
        self._walk = None

    def _documents(self) -> Iterator[Document | UnreadableError]:
        """This epoch's documents from `position` on."""
        if isinstance(self.source, StreamedSource):
            yield from self._blocks(self.source)
            return
        order = permutation(len(self.source), self.seed, self.source.name, self.epoch)
        for index in order[self.position :].tolist():
            yield _read(self.source, index)

    def _blocks(self, source: StreamedSource) -> Iterator[Document | UnreadableError]:
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
            raise DataError(
                f"mixture.{self.source.name}: no training document among {self.position}"
                f" ({self.empty} empty, {len(self.unreadable.names)} unreadable, the rest held out"
                f" by eval_fraction={self.eval_fraction}); add data or lower eval_fraction"
            )
        self.epoch, self.position, self._used, self._walk = self.epoch + 1, 0, 0, None

    def _documents_seen(self) -> int:
        if isinstance(self.source, IndexedSource):
            return len(self.source)
        return max(self.position, _SMALLEST_SAMPLE)

    def _fingerprint(self) -> str:
        return self.source.fingerprint() if isinstance(self.source, IndexedSource) else "streamed"


def held_out_documents(
    source: IndexedSource | StreamedSource, *, eval_fraction: float, max_unreadable: float
) -> Iterator[Document]:
    """Yields the held-out documents in an order that no seed changes.

    Raises:
        DataError: if too many documents are unreadable.
    """
    unreadable = Unreadable(source.name, max_unreadable)
    if isinstance(source, IndexedSource):
        total = len(source)
        order = permutation(total, source.name, "held out").tolist()
        walk: Iterator[Document | UnreadableError] = (_read(source, index) for index in order)
    else:
        total, walk = 0, source.read_from(0)
    for seen, item in enumerate(walk, 1):
        if isinstance(item, UnreadableError):
            unreadable.note(item, total or max(seen, _SMALLEST_SAMPLE))
        elif item.text and held_out(item.text, eval_fraction):
            yield item


def _read(source: IndexedSource, index: int) -> Document | UnreadableError:
    try:
        return source.read(index)
    except UnreadableError as error:
        return error
