"""Conversations to rows of ids: laid out by the model's processor, media encoded by its codecs.

Only the codecs of a model folder are opened, never its backbone.

Footguns:
- A codec may give another id where a number lies between two codes and the batch, the number of
  threads or the machine changes a rounding. So blocks are fixed by the source's order alone, torch
  runs on one thread, and the audit encodes the same blocks again.
- Media that enter as features have no ids: a conversation with one is refused by name.

Shapes: B conversations of a block, N positions of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from xoron_core import fill, sequence
from xoron_core.components import Codec
from xoron_core.errors import ConfigError, DataError, SequenceError
from xoron_core.folder import load_slot
from xoron_core.processor import XoronProcessor
from xoron_core.sequence import Plan, media_parts
from xoron_core.tokens.space import TokenSpace
from xoron_core.values import Codes
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation
from xoron_train.data.media_hash import conversation_digests, media_digests
from xoron_train.data.order import below
from xoron_train.data.sources import UnreadableError
from xoron_train.data.talks import MIXED
from xoron_train.shards.inputs import Inputs
from xoron_train.shards.rows import Row


class Rules(NamedTuple):
    """What decides whether a conversation is taken.

    Attributes:
        eval_fraction: share of media that is held out; None where the source brings splits.
        max_length: most positions, None for any number.
    """

    eval_fraction: float | None
    max_length: int | None


class Block(NamedTuple):
    """Conversations that were tokenised together, and those that could not be."""

    rows: list[Row]
    unreadable: dict[str, str]
    left_out: int


@dataclass(frozen=True)
class _Draft:
    """A conversation, laid out; its codec ids are not known yet."""

    name: str
    number: int
    split: str
    digests: tuple[bytes, ...]
    media: tuple[bytes, ...]
    made: tuple[bool, ...]
    task: str
    plan: Plan


class Tokenization:
    """What a model folder makes of conversations.

    Args:
        folder: of the model; only its processor and its codecs are opened.
        device: that codecs run on.

    Raises:
        ConfigError: if the model takes no text.
        FolderError, TokenSpaceError: if the folder is incomplete or inconsistent.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        self.device = device
        self.processor = XoronProcessor.from_pretrained(folder)
        if self.processor.tokenizer is None or self.processor.space is None:
            raise ConfigError(
                f"{folder}: this model has no tokenizer, so conversations have no ids; compose one"
                " in (it comes with: pip install xoron-llm)"
            )
        self.codecs: dict[str, Codec] = {
            slot: cast(Codec, load_slot(folder, slot).eval().to(device))
            for slot in self.processor.composition.of_kind("codec")
        }

    @property
    def space(self) -> TokenSpace:
        """What the ids mean."""
        return cast(TokenSpace, self.processor.space)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Runs torch on one thread inside the block, so that ids do not depend on how many."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def block(self, inputs: Inputs, part: str, indices: range, *, rules: Rules) -> Block:
        """Tokenises some conversations of one part, their media encoded together."""
        drafts: list[_Draft] = []
        unreadable: dict[str, str] = {}
        left_out = 0
        for index in indices:
            name = f"{part}[{index}]"
            try:
                conversation = inputs.parts[part][index]
                name = conversation.name
                draft = self._draft(conversation, index, part, rules=rules)
            except UnreadableError as error:
                unreadable[_unused(error.name, unreadable)] = error.reason
            except (DataError, SequenceError, OSError) as error:
                unreadable[_unused(name, unreadable)] = str(error)
            else:
                left_out += draft is None
                drafts += [] if draft is None else [draft]
        return Block(self._rows(drafts), unreadable, left_out)

    def _draft(
        self, conversation: Conversation, index: int, part: str, *, rules: Rules
    ) -> _Draft | None:
        """A conversation, laid out, or None if its media are on both sides of the split."""
        messages = conversation.messages
        placed = media_parts(messages, self.processor.modalities)
        media = media_digests(self.processor, placed)
        digests = frozenset(media) or conversation_digests(self.processor, messages)
        split = part if rules.eval_fraction is None else side(digests, rules.eval_fraction)
        if split == MIXED:
            return None
        plan = self.processor.plan(messages, train=True)
        for span in plan.spans:
            if span.slot not in self.codecs:
                modality = self.processor.composition.slots[span.slot].modality
                direction = "out" if span.slot.endswith(".generator") else "in"
                raise DataError(
                    f"its {modality} goes through {span.slot}, which gives no ids, so it cannot be"
                    f" tokenised; compose a codec in and set {modality}.routes: {{{direction}:"
                    " codec}, or train on the conversations themselves"
                )
        _check(plan, rules.max_length)
        return _Draft(
            conversation.name,
            index,
            split,
            tuple(sorted(digests)),
            tuple(media),
            tuple(medium.target for medium in placed),
            _task(placed),
            plan,
        )

    def _rows(self, drafts: Sequence[_Draft]) -> list[Row]:
        if not drafts:
            return []
        plans = [draft.plan for draft in drafts]
        ids, metadata = self._encode(plans)
        return [self._row(draft, ids[b], metadata) for b, draft in enumerate(drafts)]

    def _encode(self, plans: Sequence[Plan]) -> tuple[Tensor, dict[str, Iterator[Any]]]:
        """(B, N) ids with codes written in, and each slot's decode metadata in the media's order.

        The same path as in training: `fill.write_codes` at the spans of a collated batch.
        """
        processor = self.processor
        batch = sequence.collate(plans, pad_id=0, gather_items=processor.collate_media)
        ids, metadata = batch["input_ids"], {}
        for slot, entry in batch.get("media", {}).items():
            spans, tensors = fill.split_spans(entry)
            codec = self.codecs[slot]
            with torch.no_grad():
                found = codec.encode(**{k: t.to(self.device) for k, t in tensors.items()})
            codes = Codes(found.ids.cpu(), found.mask.cpu(), found.metadata)
            names = fill.codec_range_names(type(codec), codec.config)
            ids = fill.write_codes(
                ids, cast(Tensor, spans), codes, ranges=names, space=self.space, slot=slot
            )
            metadata[slot] = iter(codes.metadata)
        return ids, metadata

    def _row(self, draft: _Draft, ids: Tensor, metadata: Mapping[str, Iterator[Any]]) -> Row:
        plan = draft.plan
        spans = []
        for span, digest, made in zip(plan.spans, draft.media, draft.made, strict=True):
            codec = self.codecs[span.slot]
            name = fill.codec_range_names(type(codec), codec.config)[0].rpartition(":")[0]
            spans.append(
                {
                    "slot": span.slot,
                    "codec": name,
                    "start": span.start,
                    "length": span.length,
                    "made": made,
                    "medium": digest.hex(),
                    "metadata": json.dumps(dict(next(metadata[span.slot])), sort_keys=True),
                }
            )
        n = len(plan.input_ids)
        labels = [{"position": at, "id": label} for at, label in sorted(plan.labels.items())]
        return Row(
            draft.name,
            draft.number,
            draft.split,
            draft.task,
            [digest.hex() for digest in draft.digests],
            ids[:n].numpy().astype("int32"),
            plan.learned.numpy(),
            labels,
            spans,
        )


def side(digests: frozenset[bytes], eval_fraction: float) -> str:
    """`train`, `held-out`, or `mixed` for media of both sides; as the trainer splits tables."""
    sides = {HELD_OUT if below(digest, eval_fraction) else TRAIN for digest in digests}
    return sides.pop() if len(sides) == 1 else MIXED


def _unused(name: str, names: Mapping[str, str]) -> str:
    """The name, told apart from an equal one: files of two folders may be called the same."""
    others = (f"{name} ({number})" for number in count(2))
    return next(free for free in chain([name], others) if free not in names)


def _check(plan: Plan, max_length: int | None) -> None:
    length = len(plan.input_ids)
    if max_length is not None and length > max_length:
        raise DataError(f"takes {length} positions, more than --max-length {max_length}")
    if not (plan.learned.any() or plan.labels):
        raise DataError(
            "the assistant says nothing in it that could be learned, and no medium has labels"
        )


def _task(placed: Sequence[sequence.Placed]) -> str:
    """What is shown and what is made, e.g. `image->text`."""
    shown, made = ({m.modality for m in placed if m.target is on} for on in (False, True))
    return f"{'+'.join(sorted(shown)) or 'text'}->{'+'.join(sorted(made)) or 'text'}"
