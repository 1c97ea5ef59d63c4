"""What is tokenised: the conversations of a source, cut into the chunks that become shards.

A source is one that recipes know: local tables of chat messages, which are split here by a hash of
their media, or a data set of a plug-in, which brings its splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from xoron_core.errors import DataError, UsageError
from xoron_train.conversation import Conversations
from xoron_train.data.config import SourceConfig
from xoron_train.data.conversations import ConversationTable, dataset_splits, open_dataset

_WHERE = "tokens build"


class Chunk(NamedTuple):
    """Conversations `start .. stop - 1` of one part of the source, for shard `number`."""

    number: int
    part: str
    start: int
    stop: int

    def blocks(self, size: int) -> Iterable[range]:
        """Its indices in groups that are encoded together."""
        for start in range(self.start, self.stop, size):
            yield range(start, min(start + size, self.stop))


class Inputs:
    """The conversations of a source.

    Args:
        config: of kind `conversations` or `dataset`.
        splits: of a data set; none for all of them.
        limit: at most so many of each split.

    Attributes:
        parts: conversations by split; a local table is one part without a name.
        sizes: how many of each part are taken.

    Raises:
        UsageError: for a data set that no plug-in offers, or splits of a local table.
        DataError: if something is missing or empty.
    """

    def __init__(
        self, config: SourceConfig, *, splits: Sequence[str] = (), limit: int | None = None
    ) -> None:
        self.config = config
        self.parts: dict[str, Conversations]
        if config.kind == "dataset":
            chosen = splits or dataset_splits(_WHERE, config)
            self.parts = {split: open_dataset(_WHERE, config, split) for split in chosen}
        elif config.kind == "conversations":
            if splits:
                raise UsageError(
                    f"{config.path}: a local table is split by its media (--eval-fraction); leave"
                    " --split out, or tokenise a data set of a plug-in"
                )
            self.parts = {"": ConversationTable(_WHERE, config.path, column=config.column)}
        else:
            raise UsageError(
                f"a source of kind {config.kind!r} holds no conversations; expected a data set of"
                " a plug-in, or .jsonl or .parquet files of chat messages"
            )
        whole = {part: len(conversations) for part, conversations in self.parts.items()}
        self.sizes = {p: n if limit is None else min(n, limit) for p, n in whole.items()}

    @property
    def total(self) -> int:
        """Conversations that are taken, of all parts."""
        return sum(self.sizes.values())

    @property
    def fingerprint(self) -> str:
        """A string that changes when local files or their sizes do, or a data set's size."""
        marks = []
        for part, conversations in self.parts.items():
            own = getattr(conversations, "fingerprint", None)
            mark = f"{len(conversations)} conversations" if own is None else str(own())
            marks.append(f"{part}: {mark}" if part else mark)
        return "; ".join(marks)

    def chunks(self, shard_size: int) -> list[Chunk]:
        """The source cut into shards, in order."""
        return chunks(self.sizes.items(), shard_size)

    def require(self, fingerprint: str) -> None:
        """Refuses a source that is no longer the one that was tokenised.

        Raises:
            DataError: with both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise DataError(
                f"{self.config.path}: its conversations have changed since they were tokenised"
                f" ({fingerprint} then, {self.fingerprint} now); restore them, or build anew"
            )


def chunks(sizes: Iterable[tuple[str, int]], shard_size: int) -> list[Chunk]:
    """The chunks of parts of these sizes, in this order."""
    spans = [
        (part, start, min(start + shard_size, size))
        for part, size in sizes
        for start in range(0, size, shard_size)
    ]
    return [Chunk(number, *span) for number, span in enumerate(spans)]
