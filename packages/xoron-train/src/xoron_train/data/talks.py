"""Conversations laid out for training, each a row of its own, and the side of the split it is on.

A conversation is held out by its media, so that one image never lies on both sides, wherever it is
stored and however often it stands in the data: a medium is held out by its digest, and a
conversation belongs to a side if all of its media do. One with media of both sides is on neither:
trained on, it would show held-out media; evaluated on, trained ones. It is left out and counted. So
is one that would be trained on but holds a medium of the golden set.

Which side a conversation is on is remembered, so that its media are loaded for that only once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xoron_core.errors import DataError, SequenceError
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation, Conversations
from xoron_train.data.media_hash import conversation_digests
from xoron_train.data.order import below
from xoron_train.data.sources import IndexedSource, UnreadableError
from xoron_train.data.workers import read_ahead

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor
    from xoron_core.sequence import Plan

logger = logging.getLogger("xoron.train")

MIXED = "mixed"
GOLDEN = "golden"
BARE = "without a medium"
_SIDES = ("", TRAIN, HELD_OUT, MIXED, GOLDEN, BARE)  # by the number that is remembered


@dataclass(frozen=True)
class Talk:
    """A conversation as training takes it.

    Attributes:
        name: what it is reported under.
        on: the side it is on: `train`, `held-out`, `mixed` or `golden`; `without a medium` where
            media alone are trained on.
        conversation: as it was read, or None if that was not needed.
        plan: its layout, likewise.
        media: where media alone are trained on: by slot, what its processor made of each.
    """

    name: str
    on: str
    conversation: Conversation | None = None
    plan: Plan | None = None
    media: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def side(self, eval_fraction: float) -> str:
        """The side it is on; it was decided when it was read."""
        return self.on


class TalkSource(IndexedSource[Talk]):
    """The conversations of one source that are on one side, laid out.

    Args:
        name: of the source.
        conversations: all of them.
        processor: lays them out; its budgets are used.
        wanted: the side that is read; others are told apart, but not laid out.
        length: the most positions that one may take.
        eval_fraction: share of the media that is held out; None if the split is not ours to make:
            all are then on the side that is wanted.
        golden: digests of media that are kept out of training.
        workers: processes that read ahead.
    """

    def __init__(
        self,
        name: str,
        conversations: Conversations,
        *,
        processor: XoronProcessor,
        wanted: str,
        length: int,
        eval_fraction: float | None,
        golden: frozenset[bytes] = frozenset(),
        workers: int = 0,
    ) -> None:
        self.name = name
        self.conversations = conversations
        self.processor = processor
        self.wanted = wanted
        self.length = length
        self.eval_fraction = eval_fraction
        self.golden = golden
        self.workers = workers
        self.sides = np.zeros(len(conversations), np.int8)

    def other_side(self, wanted: str) -> TalkSource:
        """The same source read for another side; what is remembered is shared."""
        other = copy.copy(self)
        other.wanted = wanted
        return other

    def __len__(self) -> int:
        return len(self.conversations)

    def read(self, index: int) -> Talk:
        known = _SIDES[self.sides[index]]
        if known and known != self.wanted:
            return Talk(f"{self.name}[{index}]", known)
        name = f"{self.name}[{index}]"
        try:
            conversation = self.conversations[index]
            name = conversation.name
            side = known or self._side(conversation)
            if side != self.wanted:
                return Talk(name, side)
            return self._laid_out(Talk(name, side, conversation), conversation)
        except (DataError, SequenceError, OSError) as error:
            raise UnreadableError(name, str(error)) from None

    def walk(self, indices: Iterable[int]) -> Iterator[Talk | UnreadableError]:
        order = list(indices)
        items = read_ahead(self.attempt, order, self.workers)
        for index, item in zip(order, items, strict=True):
            if isinstance(item, Talk):
                self._remember(index, item)
            yield item

    def fingerprint(self) -> str:
        own = getattr(self.conversations, "fingerprint", None)
        return f"{len(self)} conversations" if own is None else str(own())

    def _laid_out(self, talk: Talk, conversation: Conversation) -> Talk:
        """The same with what a batch is made of."""
        plan = self.processor.plan(conversation.messages, train=True)
        if len(plan.input_ids) > self.length:
            raise DataError(
                f"takes {len(plan.input_ids)} positions, more than sequence_length={self.length}"
            )
        if not (plan.learned.any() or plan.labels):
            raise DataError(
                "the assistant says nothing in it that could be learned, and no medium has labels"
            )
        return replace(talk, plan=plan)

    def _digests(self, conversation: Conversation) -> frozenset[bytes]:
        """Of what decides which side it is on."""
        return conversation_digests(self.processor, conversation.messages)

    def _side(self, conversation: Conversation) -> str:
        own = self.wanted if self.eval_fraction is None else ""
        if not self.eval_fraction and not self.golden:
            return own or TRAIN
        digests = self._digests(conversation)
        share = self.eval_fraction or 0.0
        sides = {own or (HELD_OUT if below(digest, share) else TRAIN) for digest in digests}
        side = sides.pop() if len(sides) == 1 else MIXED
        return GOLDEN if side == TRAIN and digests & self.golden else side

    def _remember(self, index: int, talk: Talk) -> None:
        if talk.on == GOLDEN and not self.sides[index]:
            logger.info(
                "mixture.%s: kept %s out of training: it holds a medium of the golden set (%d so"
                " far)",
                self.name,
                talk.name,
                int((self.sides == _SIDES.index(GOLDEN)).sum()) + 1,
            )
        self.sides[index] = _SIDES.index(talk.on)


def golden_digests(
    digests: Callable[[Sequence[Mapping[str, Any]]], frozenset[bytes]],
    sets: Mapping[str, Iterable[Conversation]],
) -> frozenset[bytes]:
    """The digests of all media in the golden sets, and of the texts of those without media.

    Args:
        digests: those of a conversation, from its messages.
        sets: conversations by what they are reported under.

    Raises:
        DataError: if anything of them cannot be read.
    """
    found: set[bytes] = set()
    for name, conversations in sets.items():
        at = name
        try:
            for conversation in conversations:
                at = f"{name}: {conversation.name}"
                found |= digests(conversation.messages)
        except (DataError, SequenceError, OSError, UnreadableError) as error:
            raise DataError(
                f"golden: {at}: {error}; mend it, for what cannot be read cannot be kept out"
            ) from None
    return frozenset(found)


def indexed(conversations: Conversations) -> Iterable[Conversation]:
    """All conversations of a split, in order."""
    return (conversations[index] for index in range(len(conversations)))
