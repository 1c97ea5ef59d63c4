"""`XoronProcessor`: the union of the tokenizer, the chat template and every component's processor.

It turns messages into the batch that `XoronModel.forward` takes, without any weights, so it runs in
data workers. It is saved as the tokenizer's files; everything else it reads from `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerFast

from xoron_core import sequence
from xoron_core.components import Codec, Generator, MediaProcessor, Part, Projector
from xoron_core.composer.composition import Composition, load_factory
from xoron_core.composer.parts import typed_config
from xoron_core.composer.space import used_modalities
from xoron_core.descriptors import Modality, resolve
from xoron_core.errors import DataError, PluginError, SequenceError
from xoron_core.fill import COUNTS, codec_range_names
from xoron_core.flattening import Limits
from xoron_core.folder import read_config, read_space
from xoron_core.pieces import SpanGrammar
from xoron_core.plugins import Registry
from xoron_core.plugins import registry as installed
from xoron_core.tokens.encode import encode_chat
from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.tokenizer import encode_text

Message = Mapping[str, Any]
_NO_TEXT = (
    "this composition has no tokenizer, so it takes no text; run: pip install xoron-llm, then"
    " compose one in"
)


class XoronProcessor:
    """Messages and media to batches.

    Args:
        composition: of the model.
        tokenizer: the generated tokenizer, or None in a composition without text.
        space: the token space, or None.
        registry: the plug-ins; None takes the installed ones.

    Attributes:
        budgets: positions that an item takes, by slot of its projector, where it is to take fewer
            than it could. Only for projectors with budgets; may be set anew for every batch.
    """

    def __init__(
        self,
        composition: Composition,
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        space: TokenSpace | None = None,
        registry: Registry | None = None,
    ) -> None:
        self.composition = composition
        self.tokenizer = tokenizer
        self.space = space
        registry = registry or installed()
        self.budgets: dict[str, int] = {}
        self.modalities: dict[str, Modality] = used_modalities(composition, registry)
        self._parts: dict[str, tuple[type[Part], Any]] = {
            name: (
                load_factory(registry, registry.component(slot.kind, slot.use)),
                typed_config(registry, slot),
            )
            for name, slot in composition.slots.items()
            if slot.kind != "tokenizer" and slot.ref is None
        }
        self.processors: dict[str, MediaProcessor] = {
            name: processor
            for name, (cls, config) in self._parts.items()
            if (processor := cls.processor(config)) is not None
        }

    # text

    def encode_text(self, text: str) -> list[int]:
        """Text to ids; what looks like a special token stays text."""
        return encode_text(self._need_tokenizer(), text)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Ids to text."""
        tokenizer = self._need_tokenizer()
        return cast(str, tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    # sequences

    def span_grammar(self) -> SpanGrammar:
        """Builds and parses sequences of text and media codes of this composition.

        Raises:
            PluginError: if it has neither a tokenizer nor a codec.
        """
        if self.space is None:
            raise PluginError(f"there are no sequences: {_NO_TEXT}")
        limits: dict[str, Limits] = {}
        for cls, config in self._parts.values():
            if issubclass(cls, Codec):
                name = codec_range_names(cls, config)[0].rpartition(":")[0]
                limits[name] = cls.frame_limits(config)
        return SpanGrammar(self.space, self.modalities, limits=limits)

    # conversations

    def plan(
        self, messages: Sequence[Message], *, train: bool = False, **template: Any
    ) -> sequence.Plan:
        """Lays out one conversation.

        Args:
            messages: Hugging Face chat messages.
            train: whether to mark what is learned.
            **template: for the chat template.

        Raises:
            SequenceError: if media and placeholders do not agree.
            PluginError: if nothing reads or makes a medium that is there.
        """
        tokenizer = self._need_tokenizer()
        space = cast(TokenSpace, self.space)
        placed = sequence.media_parts(messages, self.modalities)
        encoded = encode_chat(
            tokenizer,
            space,
            messages,
            return_assistant_mask=train,
            media=self._media_markers,
            **template,
        )
        ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
        learned = torch.zeros(len(ids), dtype=torch.bool)
        if train:
            learned = torch.tensor(encoded.assistant_mask, dtype=torch.bool)
        if not placed:
            return sequence.Plan(ids, learned)
        return sequence.expand(
            ids,
            learned,
            placed,
            composition=self.composition,
            modalities=self.modalities,
            space=space,
            measure=self._measure,
            label_id=cache(self._label_id) if train else None,
        )

    def _label_id(self, label: str) -> int:
        ids = encode_text(self._need_tokenizer(), label)
        if len(ids) != 1:
            raise SequenceError(
                f"label {label!r} of a medium is {len(ids)} ids in this tokenizer, expected 1:"
                " a position learns one; choose shorter labels or a tokenizer that knows the word"
            )
        return ids[0]

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        train: bool = False,
        padding_side: str | None = None,
        **template: Any,
    ) -> BatchFeature:
        """One conversation or several to a batch.

        Args:
            messages: Hugging Face chat messages.
            train: adds labels on what the assistant says; else a generation prompt is added.
            padding_side: `left` or `right`; by default left to generate, right to train.
            **template: for the chat template, e.g. `tools` or `enable_thinking`.
        """
        if not messages:
            raise SequenceError("no messages were given; expected a list of {role, content}")
        many = not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], messages if many else [messages])
        template.setdefault("add_generation_prompt", not train)
        plans = [self.plan(talk, train=train, **template) for talk in conversations]
        return BatchFeature(
            sequence.collate(
                plans,
                pad_id=cast(int, self._need_tokenizer().pad_token_id),
                padding_side=padding_side or ("right" if train else "left"),
                train=train,
                gather_items=self.collate_media,
            )
        )

    # media

    def load_media(self, slot: str, media: Any) -> dict[str, Any]:
        """A path, bytes or array to the item that the component in `slot` takes.

        Raises:
            PluginError: if nothing there takes media.
            DataError: if this one cannot be loaded.
        """
        processor = self.processors.get(slot)
        if processor is None:
            raise PluginError(
                f"nothing in slot {slot!r} takes media; this composition takes them in:"
                f" {', '.join(self.processors) or 'no slot'}"
            )
        modality = self.modalities[self.composition.slots[slot].modality]
        try:
            loaded = resolve(modality.load)(media)
        except (OSError, ValueError) as error:  # how a plug-in's loader meets a missing or odd file
            name = media if isinstance(media, str | Path) else type(media).__name__
            raise DataError(f"{name}: cannot be loaded as {modality.name} ({error})") from error
        return processor.load(loaded)

    def collate_media(self, slot: str, items: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items to the tensors that the component in `slot` takes, and `counts` if planned."""
        batch = self.processors[slot].collate([dict(item) for item in items])
        if all(COUNTS in item for item in items):
            batch[COUNTS] = torch.tensor([item[COUNTS] for item in items])
        return batch

    def media_batch(self, slot: str, media: Sequence[Any]) -> dict[str, Tensor]:
        """Media to the tensors that the component in `slot` takes."""
        return self.collate_media(slot, [self.load_media(slot, medium) for medium in media])

    @property
    def _media_markers(self) -> dict[str, tuple[str, str]] | None:
        """What stands for a medium where the template is not ours and renders none."""
        if self.composition.template == "xoron":
            return None
        return {
            kind: (f"{m.begin}{m.placeholder}{m.end}", f"{m.gen_begin}{m.placeholder}{m.gen_end}")
            for m in self.modalities.values()
            for kind in m.content_types
        }

    def _measure(self, slot: str, media: Any) -> tuple[Mapping[str, Any], int, int]:
        item = self.load_media(slot, media)
        cls, config = self._parts[slot]
        space = cast(TokenSpace, self.space)
        modality = self.modalities[self.composition.slots[slot].modality]
        placeholder = space.id_of(modality.placeholder)
        if issubclass(cls, Generator):
            return item, cls.num_queries(config), placeholder
        count = self.processors[slot].num_positions(item)
        if issubclass(cls, Codec):
            names = codec_range_names(cls, config)
            return item, count * len(names), space.range(names[0]).start
        name = f"{slot.rpartition('.')[0]}.projector"
        if name not in self._parts:
            raise PluginError(
                f"slot {slot!r}: nothing fills {name!r}, which puts its features into a sequence;"
                f" compose one in, as {name}: {{use: NAME}}"
            )
        projector, projector_config = self._parts[name]
        assert issubclass(projector, Projector)
        budget = self.budgets.get(name)
        if projector.budgeted:
            count = budget or projector.num_positions(projector_config, count)
            return {**item, COUNTS: count}, count, placeholder
        if budget is not None:
            raise SequenceError(
                f"slot {name!r}: a budget of {budget} positions was set, but {projector.__name__}"
                " makes a fixed number; remove it from the processor's budgets"
            )
        return item, projector.num_positions(projector_config, count), placeholder

    # folders

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the tokenizer's files into a model folder.

        Raises:
            OSError: if they cannot be written.
        """
        if self.tokenizer is None:
            return
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(str(error)) from error  # how tokenizers reports a full disk

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, registry: Registry | None = None) -> Self:
        """Reads a model folder's processor.

        Raises:
            FolderError, TokenSpaceError: if the folder is incomplete or inconsistent.
        """
        config, composition = read_config(folder)
        space = read_space(folder, config.token_space_hash)
        tokenizer = None
        if composition.of_kind("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(composition, tokenizer=tokenizer, space=space, registry=registry)

    def _need_tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise PluginError(_NO_TEXT)
        return self.tokenizer
