"""The conversations of a recipe's mixture: opened once, kept off the golden set, by split.

Local tables are split by a hash of their media (see `talks`); a data set of a plug-in brings its
own splits, of which `train` is trained, and shards keep those that they were written with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from xoron_core.errors import ConfigError, DataError, did_you_mean
from xoron_core.tokens.space import TokenSpace
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation, Conversations
from xoron_train.data.conversations import ConversationTable, dataset_splits, open_dataset
from xoron_train.data.cursor import held_out_documents
from xoron_train.data.media_hash import conversation_digests
from xoron_train.data.talks import Talk, TalkSource, golden_digests, indexed
from xoron_train.shards.source import ShardSource

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor
    from xoron_train.recipe import Recipe


class TalkMixture:
    """The sources of conversations in a recipe.

    Args:
        recipe: its mixture, golden set, split and row length are used.
        processor: lays conversations out; its budgets are used.

    Raises:
        UsageError: for a data set that no plug-in offers.
        DataError: if something is missing, empty or, in the golden set, unreadable.
    """

    def __init__(self, recipe: Recipe, processor: XoronProcessor) -> None:
        self.recipe = recipe
        self.processor = processor
        self._opened: dict[tuple[str, str], Conversations] = {}  # splits of data sets
        sets = {name: indexed(self._golden_set(name)) for name in recipe.golden}
        self.golden = golden_digests(self._digests, sets)
        self.training = {
            name: self._source(name, TRAIN)
            for name, config in recipe.mixture.items()
            if config.holds_conversations
        }

    def require_codecs(self, model: XoronModel) -> None:
        """Refuses shards whose ids were made with other codecs than the model's.

        Raises:
            DataError: naming both.
        """
        for source in self.training.values():
            if isinstance(source, ShardSource):
                source.require_codecs(model)

    def held_out(self, name: str, limit: int | None = None) -> Iterator[Talk]:
        """The held-out conversations of a source, laid out, in an order that no seed changes.

        Of a data set and of shards: those of the split `held-out`, or of the first one beside
        `train`.

        Raises:
            DataError: if too many are unreadable.
        """
        config = self.recipe.mixture[name]
        split = HELD_OUT
        if config.kind in ("dataset", "shards"):
            source = self.training[name]
            splits = (
                source.splits
                if isinstance(source, ShardSource)
                else dataset_splits(f"mixture.{name}", config)
            )
            others = [split for split in splits if split != TRAIN]
            if not others:
                return iter(())
            split = HELD_OUT if HELD_OUT in others else others[0]
        return itertools.islice(self._of_split(name, split), limit)

    def samples(self, name: str, split: str, count: int) -> list[Conversation]:
        """The first conversations of a split, for an evaluation.

        Args:
            name: of a source of conversations.
            split: of it; a local table has `train` and `held-out`.
            count: at most so many.

        Raises:
            ConfigError: for a source that holds no conversations.
            DataError: for a split that does not exist or holds nothing.
        """
        config = self.recipe.mixture[name]
        if not config.holds_conversations:
            raise ConfigError(f"mixture.{name}: holds text, and an evaluation needs conversations")
        if config.kind == "shards":
            raise ConfigError(
                f"mixture.{name}: holds ids, and an evaluation needs conversations; name what the"
                " shards were made of as a source of its own, with a small weight"
            )
        if config.kind == "dataset":
            opened = self._split(name, split)
            return [opened[index] for index in range(min(count, len(opened)))]
        if split not in (TRAIN, HELD_OUT):
            raise DataError(
                f"mixture.{name}: local files have the splits {TRAIN} and {HELD_OUT}, not"
                f" {split!r}.{did_you_mean(split, (TRAIN, HELD_OUT))}"
            )
        talks = itertools.islice(self._of_split(name, split), count)
        found = [talk.conversation for talk in talks if talk.conversation is not None]
        if not found:
            raise DataError(f"mixture.{name}: nothing of it is in the split {split!r}")
        return found

    def _of_split(self, name: str, split: str) -> Iterator[Talk]:
        recipe, source = self.recipe, self.training[name]
        brought = recipe.mixture[name].kind == "dataset"
        source = self._source(name, HELD_OUT, split) if brought else source.other_side(split)
        return held_out_documents(
            source,
            eval_fraction=recipe.eval_fraction,
            max_unreadable=recipe.max_unreadable,
            side=HELD_OUT if brought else split,
        )

    def _source(self, name: str, wanted: str, split: str = TRAIN) -> TalkSource | ShardSource:
        config = self.recipe.mixture[name]
        if config.kind == "shards":
            return ShardSource(
                name,
                config.path,
                space=cast(TokenSpace, self.processor.space),
                wanted=wanted,
                length=self.recipe.sequence_length,
                golden=self.golden,
            )
        brought = config.kind == "dataset"
        opened: Conversations = (
            self._split(name, split)
            if brought
            else ConversationTable(f"mixture.{name}", config.path, column=config.column)
        )
        return self._open(
            name,
            opened,
            processor=self.processor,
            wanted=wanted,
            length=self.recipe.sequence_length,
            eval_fraction=None if brought else self.recipe.eval_fraction,
            golden=self.golden if wanted == TRAIN else frozenset(),
            workers=self.recipe.num_workers,
        )

    def _open(self, name: str, conversations: Conversations, **keys: Any) -> TalkSource:
        return TalkSource(name, conversations, **keys)

    def _digests(self, messages: Sequence[Mapping[str, Any]]) -> frozenset[bytes]:
        """Of what a conversation of the golden set keeps out of training."""
        return conversation_digests(self.processor, messages)

    def _golden_set(self, name: str) -> Conversations:
        source, _, split = name.rpartition(":")
        config = self.recipe.mixture.get(source)
        if config is not None and config.kind == "dataset":
            return self._split(source, split)
        return ConversationTable("golden", name)

    def _split(self, name: str, split: str) -> Conversations:
        if (name, split) not in self._opened:
            config = self.recipe.mixture[name]
            self._opened[name, split] = open_dataset(f"mixture.{name}", config, split)
        return self._opened[name, split]
