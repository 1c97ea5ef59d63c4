"""Feeds a run that trains on media alone: codecs and autoencoders, which learn from no sequence.

A row is a conversation, of which only the media of one modality are read, whoever says them; what
else stands in it does not matter. Everything else is as for rows of text: mixture, split by what
media show, golden sets, order, resume, dealing to processes.

Footguns:
- `batch_size` counts conversations. One with three images brings three; one with none is passed
  over and counted.
- `sequence_length` means nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xoron_core.components import Autoencoder, Codec
from xoron_core.errors import ConfigError
from xoron_core.sequence import Placed, media_parts
from xoron_train.conversation import Conversation, Conversations
from xoron_train.data.feed import BaseFeed
from xoron_train.data.media_hash import media_digests
from xoron_train.data.packing import Row
from xoron_train.data.stream import TrainStream
from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.data.talks import BARE, Talk, TalkSource
from xoron_train.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class MediaSource(TalkSource):
    """The conversations of one source that hold media of one modality.

    Args:
        name, conversations, **keys: as for `TalkSource`.
        slots: that take the media, all of one modality.
    """

    def __init__(
        self, name: str, conversations: Conversations, *, slots: Sequence[str], **keys: Any
    ) -> None:
        super().__init__(name, conversations, **keys)
        self.slots = tuple(slots)

    def _laid_out(self, talk: Talk, conversation: Conversation) -> Talk:
        media = [one.media for one in media_of(self.processor, self.slots, conversation.messages)]
        load = self.processor.load_media
        return replace(
            talk, media={slot: [load(slot, medium) for medium in media] for slot in self.slots}
        )

    def _side(self, conversation: Conversation) -> str:
        if not media_of(self.processor, self.slots, conversation.messages):
            return BARE
        return super()._side(conversation)

    def _digests(self, conversation: Conversation) -> frozenset[bytes]:
        placed = media_of(self.processor, self.slots, conversation.messages)
        return frozenset(media_digests(self.processor, placed))


class MediaMixture(TalkMixture):
    """The sources of conversations in a recipe, read for their media.

    Args:
        recipe, processor: as for `TalkMixture`.
        slots: that take the media, all of one modality.
    """

    def __init__(self, recipe: Recipe, processor: XoronProcessor, *, slots: Sequence[str]) -> None:
        self.slots = tuple(slots)
        super().__init__(recipe, processor)

    def _open(self, name: str, conversations: Conversations, **keys: Any) -> TalkSource:
        return MediaSource(name, conversations, slots=self.slots, **keys)

    def _digests(self, messages: Sequence[Mapping[str, Any]]) -> frozenset[bytes]:
        placed = media_of(self.processor, self.slots, messages)
        return frozenset(media_digests(self.processor, placed))


class MediaFeed(BaseFeed):
    """A recipe's media, from its sources to batches.

    Args:
        recipe: resolved.
        model: whose slots take the media.
        processor: of the model.
        accelerator: its processes share the rows.
        slots: codecs and autoencoders that are trained, all of one modality.

    Raises:
        ConfigError: for text in the mixture, keys and slots that do not fit, or a slot that cannot
            be trained.
        DataError: if there is nothing to train on.
    """

    unit = "items"

    def __init__(
        self,
        recipe: Recipe,
        model: XoronModel,
        *,
        processor: XoronProcessor,
        accelerator: Accelerator,
        slots: Sequence[str],
    ) -> None:
        _check(recipe, model, slots)
        super().__init__(recipe, model, accelerator=accelerator)
        self.slots = tuple(slots)
        self.processor = processor
        self.talks = MediaMixture(recipe, processor, slots=slots)
        self.begin(TrainStream(recipe, None, talks=self.talks.training))

    def collate(
        self, rows: Sequence[Row | Talk], budgets: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Rows to one batch; `budgets` are of projectors, and none is here."""
        talks = [row for row in rows if isinstance(row, Talk)]
        return {
            "media": {
                slot: self.processor.collate_media(
                    slot, [item for talk in talks for item in talk.media[slot]]
                )
                for slot in self.slots
            }
        }


def media_of(
    processor: XoronProcessor, slots: Sequence[str], messages: Sequence[Mapping[str, Any]]
) -> list[Placed]:
    """The media of the slots' modality in a conversation, in order, not yet loaded.

    Raises:
        SequenceError: for one without its data.
    """
    name = processor.composition.slots[slots[0]].modality
    modality = processor.modalities[name]
    return media_parts([_only(m, modality.content_types) for m in messages], {name: modality})


def _only(message: Mapping[str, Any], types: Sequence[str]) -> Mapping[str, Any]:
    """A message with nothing but content of these types."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    kept = [part for part in content if isinstance(part, Mapping) and part.get("type") in types]
    return {**message, "content": kept}


def _check(recipe: Recipe, model: XoronModel, slots: Sequence[str]) -> None:
    named = ", ".join(slots)
    if texts := [name for name, one in recipe.mixture.items() if not one.holds_conversations]:
        raise ConfigError(
            f"mixture.{texts[0]}: holds text, and {named} learns from media alone; leave it out,"
            " or train something that reads text"
        )
    if shards := [name for name, one in recipe.mixture.items() if one.kind == "shards"]:
        raise ConfigError(
            f"mixture.{shards[0]}: holds ids, and {named} learns from media; name what the shards"
            " were made of instead"
        )
    for key, of in (("budgets", "projectors"), ("legal", "sequences")):
        if getattr(recipe, key):
            raise ConfigError(f"{key}: is about {of}, and {named} trains without; remove it")
    for slot in slots:
        if type(model.part(slot)).forward in (Codec.forward, Autoencoder.forward):
            raise ConfigError(
                f"train: slot {slot!r} holds {model.composition.slots[slot].use}, which has no"
                " training path; leave it out, or compose one that has"
            )
    modalities = {model.composition.slots[slot].modality for slot in slots}
    if len(modalities) > 1:
        raise ConfigError(
            f"{named}: are of the modalities {', '.join(sorted(modalities))}, and a run trains one"
            f" at a time; choose by train, e.g. train: [{slots[0]}]"
        )
