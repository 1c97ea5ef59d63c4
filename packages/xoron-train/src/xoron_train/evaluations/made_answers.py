"""Answers that a model makes, media included, and what is wrong with them. For `making`.

Footgun: an answer that is asked for media begins with them. It is the begin marker that is forced,
nothing else.

Shapes: B answers of a batch, L ids of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xoron_core.errors import DataError, SequenceError, TokenSpaceError, XoronError
from xoron_core.events import Event, MediaOut, TokenInfo
from xoron_core.grammar import Grammar
from xoron_core.pieces import CodedPiece, TextPiece
from xoron_core.sampling import Sampling, text_rows
from xoron_core.session import Session
from xoron_core.testing.tensors import named, not_finite
from xoron_train.conversation import Conversation
from xoron_train.data.batches import to_device

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


_OUT_OF_RANGE = (SequenceError, TokenSpaceError)


@dataclass
class Answer:
    """What became of one conversation.

    Attributes:
        sample: its name.
        target: the modality that was asked for, None for text.
        ids: all that was generated.
        media: what was decoded, in order.
        fault: why it is out of range, or empty.
        trouble: why it does not decode, or empty.
        inside: ids inside media.
        unguided: how many of them the model alone would have put outside of the grammar.
    """

    sample: str
    target: str | None
    ids: list[int] = field(default_factory=list)
    media: list[Any] = field(default_factory=list)
    fault: str = ""
    trouble: str = ""
    inside: int = 0
    unguided: int = 0


class Maker:
    """Makes and examines answers that are asked for one modality, or for text.

    Args:
        model: in evaluation mode.
        processor: of the model.
        target: the modality, None for text.
        frames: modality to exactly how many frames a codec is to make of it.
        limit: ids of an answer; an open medium is finished beyond it.

    Raises:
        PluginError: if nothing in the model makes the modality.
        ConfigError: for frames that the codec does not make.
        DataError: if a generator makes it, which has no ids.
    """

    def __init__(
        self,
        model: XoronModel,
        processor: XoronProcessor,
        target: str | None,
        *,
        frames: Mapping[str, int],
        limit: int,
    ) -> None:
        self.model, self.processor, self.target, self.limit = model, processor, target, limit
        self.session = Session(model, processor)
        self.frames = {name: count for name, count in frames.items() if name == target}
        made = [] if target is None else [target]
        self.grammar = Grammar(model, processor.modalities, made, frames=self.frames)
        if any(output.layout is None for output in self.grammar.outputs.values()):
            raise DataError(
                f"making: {target} is made by a generator, not by a codec, so there are no ids to"
                " judge; leave out conversations that end with it"
            )
        self.spans = processor.span_grammar()
        ends: Any = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.text = text_rows(self.grammar.space)
        self.text[list(self.ends)] = True

    def make(self, samples: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answers to conversations whose last message is left out.

        Where decoding media fails, each is answered alone, so that a fault is one answer's.

        Raises:
            XoronError: if a prompt cannot be read, or a text cannot be made.
        """
        prompts = [list(sample.messages[:-1]) for sample in samples]
        events = self.session.stream(
            prompts,
            max_new_tokens=self.limit,
            sampling=sampling,
            begin_with=self.target,
            frames=self.frames,
            details=True,
        )
        try:
            answers = self._collect(samples, events)
        except XoronError as error:
            if self.target is None:
                raise
            if len(samples) > 1:
                return self._one_by_one(samples, sampling)
            fault = str(error) if isinstance(error, _OUT_OF_RANGE) else ""
            return [Answer(samples[0].name, self.target, fault=fault, trouble=str(error))]
        for answer in answers:
            self._examine(answer)
        if self.target is not None:
            self._ask_alone(prompts, answers)
        return answers

    def _one_by_one(self, samples: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """The same answers as in a batch, since each row draws under a seed of its own."""
        found = []
        for row, sample in enumerate(samples):
            seed = None if sampling.seed is None else sampling.seed + row * sampling.vary_rows
            found += self.make([sample], sampling.model_copy(update={"seed": seed}))
        return found

    def _collect(self, samples: Sequence[Conversation], events: Iterator[Event]) -> list[Answer]:
        answers = [Answer(sample.name, self.target) for sample in samples]
        for event in events:
            if isinstance(event, TokenInfo):
                answers[event.row].ids.append(event.id)
            elif isinstance(event, MediaOut):
                answers[event.row].media.append(event.media)
        return answers

    def _examine(self, answer: Answer) -> None:
        try:
            pieces = self.spans.parse(torch.tensor(answer.ids))
        except _OUT_OF_RANGE as error:
            answer.fault = answer.trouble = str(error)
            return
        for piece in pieces:
            if isinstance(piece, TextPiece) and not bool(self.text[list(piece.ids)].all()):
                answer.fault = "holds a special token that no text of an answer may hold"
        coded = sum(isinstance(piece, CodedPiece) for piece in pieces)
        if coded != len(answer.media) or (self.target is not None and not coded):
            answer.trouble = f"{coded} spans of codes became {len(answer.media)} media"
        elif not all(map(_is_sound, answer.media)):
            answer.trouble = "a medium is empty or holds numbers that are not finite"

    def _ask_alone(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> None:
        """Lets the model read its answers and say what it would have put at each id."""
        batch: dict[str, Any] = dict(self.processor(prompts))
        rows = [torch.tensor(answer.ids) for answer in answers]
        added = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True),
        }
        length = batch["input_ids"].shape[1]
        batch |= {key: torch.cat([batch[key], values], dim=1) for key, values in added.items()}
        output = self.model(
            **to_device(batch, self.model.device), use_cache=False, logits_to_keep=1
        )
        for answer, states in zip(answers, output.hidden[:, length - 1 : -1], strict=True):
            best = self.model.need_backbone().logits(states[: len(answer.ids)]).argmax(-1)
            self._count(answer, best.cpu())

    def _count(self, answer: Answer, best: Tensor) -> None:
        """Counts ids inside media, and those at which the model's best id is forbidden."""
        state = self.grammar.begin(self.target)
        for token, wanted in zip(answer.ids, best.tolist(), strict=True):
            if state.slot is None and state.force is None and token in self.ends:
                return
            if state.slot is not None:
                allowed = self.grammar.allowed(state)
                answer.inside += 1
                answer.unguided += wanted >= len(allowed) or not bool(allowed[wanted])
            state = self.grammar.advance(state, token)


def _is_sound(medium: Any) -> bool:
    """Whether there is something, and all numbers in it are finite, however deep they lie."""
    arrays = named(medium)
    if not arrays:  # nothing to judge: what is opaque counts, what is empty does not
        return medium is not None and (
            not isinstance(medium, Mapping | Sequence) or len(medium) > 0
        )
    return all(array.numel() for array in arrays.values()) and not not_finite(arrays)
