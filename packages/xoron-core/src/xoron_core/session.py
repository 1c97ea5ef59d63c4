"""`Session`: messages in, typed events out.

It prepares a request (template, media, grammar, cache) and hands it to `decoding`, or with a draft
model to `speculative`. Rows of a batch are independent: a row says the same alone and beside
others.

For greedy text it agrees with transformers' `model.generate`, because cache, masks and processors
are the same; sampled text of one conversation agrees under the same seed too (on one device).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from xoron_core import speculative
from xoron_core.caches import CacheOptions, Lane
from xoron_core.decoding import Decoder, Row
from xoron_core.errors import ConfigError
from xoron_core.events import Event, Finished, MediaOut, TextDelta, TokenInfo, Usage
from xoron_core.grammar import Grammar
from xoron_core.model import XoronModel
from xoron_core.prefix import PrefixCache, Prompt
from xoron_core.processor import Message, XoronProcessor
from xoron_core.sampling import Sampling
from xoron_core.text_stream import TextStream


@dataclass(frozen=True)
class Reply:
    """All that one conversation got.

    Attributes:
        text: the whole text.
        media: (modality, media) in order.
        reason: why it ended.
        tokens: how many positions were generated.
        confidence: geometric mean probability of the answer's ids; None without `details`.
        details: how sure the model was of each id; empty without `details`.
        usage: what it took, with the acceptance of a draft.
    """

    text: str
    media: tuple[tuple[str, Any], ...]
    reason: str
    tokens: int
    confidence: float | None = None
    details: tuple[TokenInfo, ...] = ()
    usage: Usage = field(default_factory=Usage)


class Session:
    """Runs a model on conversations.

    Args:
        model: a composed model.
        processor: its processor.
        cache: `dynamic` grows with the text; `static` has a fixed length.
        max_length: positions of a static cache; None takes what each request can need.
        window: each position sees this many last ones, itself included, and a dynamic cache keeps
            no more; None is all.
        compile: whether to compile the decoding step (static cache only).
        draft: a smaller model of the same token space that proposes text (speculative decoding).
        draft_tokens: how many ids it proposes at a time.

    Raises:
        ConfigError: for options that do not fit each other.
        TokenSpaceError: if the draft's ids mean something else.
    """

    def __init__(
        self,
        model: XoronModel,
        processor: XoronProcessor,
        *,
        cache: Literal["dynamic", "static"] = "dynamic",
        max_length: int | None = None,
        window: int | None = None,
        compile: bool = False,
        draft: XoronModel | None = None,
        draft_tokens: int = 4,
    ) -> None:
        self.model = model
        self.processor = processor
        self.cache = CacheOptions(cache, max_length, window, compile)
        self.draft = draft
        self.draft_tokens = draft_tokens
        if draft is not None:
            speculative.check_draft(model, draft, count=draft_tokens)
            self._need_plain_cache("a draft model")

    def stream(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        makes: Sequence[str] = (),
        begin_with: str | None = None,
        frames: Mapping[str, int] | None = None,
        show_hidden: bool = False,
        details: bool = False,
        prefix: PrefixCache | None = None,
        **template: Any,
    ) -> Iterator[Event]:
        """Generates, event by event.

        Args:
            messages: one conversation, several, or a bare text to continue without a template.
            max_new_tokens: limit per row; an open media span is still finished.
            sampling: greedy by default.
            stop: strings that end a row; they are not part of the text.
            makes: modalities that may be produced beside text.
            begin_with: a modality of `makes` that the answer must begin with.
            frames: modality to exactly how many frames a codec is to make of it.
            show_hidden: whether hidden blocks such as reasoning are part of the text.
            details: whether each id comes with its log-probability and entropy.
            prefix: what earlier requests left cached; this one takes over what agrees.
            **template: for the chat template.

        Raises:
            ConfigError: for options that do not fit each other.
            PluginError: if the composition lacks what is asked for.
            SequenceError: if messages and media do not agree.
        """
        self.model.need_backbone()
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens}: expected 1 or more")
        made = [*makes, *([begin_with] if begin_with else [])]
        if self.draft is not None and made:
            raise ConfigError(
                f"a draft model proposes text only, but this request makes {', '.join(made)}; use a"
                " session without draft for it"
            )
        if prefix is not None:
            self._need_plain_cache("a prefix cache")
        batch = self._batch(messages, template)
        grammar = Grammar(self.model, self.processor.modalities, made, frames=frames)
        sampling = sampling or Sampling()
        if unknown := sorted(set(sampling.modalities) - set(self.processor.modalities)):
            known = ", ".join(self.processor.modalities) or "none"
            raise ConfigError(
                f"sampling is set for {', '.join(unknown)}; this model's modalities: {known}"
            )
        state = grammar.begin(begin_with)
        rows = [
            Row(state, TextStream(self.processor, stop, show_hidden, ids[valid.bool()].tolist()))
            for ids, valid in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        options = {
            "grammar": grammar,
            "sampling": sampling,
            "limit": max_new_tokens,
            "details": details,
        }
        return self._run(_to(batch, self.model.device), rows, prefix, options)

    def generate(
        self, conversations: Sequence[Sequence[Message]] | Sequence[Message] | str, **options: Any
    ) -> list[Reply]:
        """As `stream`, collected: one `Reply` per conversation."""
        texts: dict[int, str] = {}
        media: dict[int, list[tuple[str, Any]]] = {}
        infos: dict[int, list[TokenInfo]] = {}
        ends: dict[int, Finished] = {}
        for event in self.stream(conversations, **options):
            if isinstance(event, TextDelta):
                texts[event.row] = texts.get(event.row, "") + event.text
            elif isinstance(event, MediaOut):
                media.setdefault(event.row, []).append((event.modality, event.media))
            elif isinstance(event, TokenInfo):
                infos.setdefault(event.row, []).append(event)
            else:
                ends[event.row] = event
        return [
            Reply(
                text=texts.get(row, ""),
                media=tuple(media.get(row, ())),
                reason=end.reason,
                tokens=end.tokens,
                confidence=end.confidence,
                details=tuple(infos.get(row, ())),
                usage=end.usage,
            )
            for row, end in sorted(ends.items())
        ]

    def _batch(self, messages: Any, template: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(messages, str):
            ids = self.processor.encode_text(messages)
            bos = cast(Any, self.processor.tokenizer).bos_token_id
            ids = [bos, *ids] if bos is not None else ids
            input_ids = torch.tensor([ids])
            return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return dict(self.processor(messages, **template))

    @torch.no_grad()
    def _run(
        self,
        batch: dict[str, Any],
        rows: list[Row],
        prefix: PrefixCache | None,
        options: dict[str, Any],
    ) -> Iterator[Event]:
        capacity = batch["input_ids"].shape[1] + options["limit"] + options["grammar"].longest_span
        if prefix is None:
            lane = Lane(self.model, self.cache, capacity)
            prompt = Prompt(lane, batch, batch["input_ids"], batch["attention_mask"], [[]], 0)
        else:
            prompt = prefix.start(self.model, batch, capacity)
        decoder = Decoder(
            prompt.lane,
            rows,
            ids=prompt.ids,
            mask=prompt.mask,
            keys=prompt.keys[0],
            reused=prompt.reused,
            ends=self._ends(),
            pad=getattr(self.processor.tokenizer, "pad_token_id", None) or 0,
            **options,
        )
        rest = {key: value for key, value in prompt.rest.items() if key != "attention_mask"}
        try:
            output = prompt.lane.run(prompt.mask, **rest)
            if self.draft is None:
                yield from decoder.run(output.logits)
            else:
                draft = Lane(self.draft, self.cache, capacity)
                yield from speculative.run(decoder, draft, self.draft_tokens, logits=output.logits)
        finally:
            if prefix is not None and len(rows) == 1:
                # Also when the reader stops early: what has run is not lost.
                prefix.keep(self.model, decoder.keys[: prompt.lane.length], prompt.lane.cache)

    def _ends(self) -> set[int]:
        declared = self.model.generation_config.eos_token_id
        return set(declared if isinstance(declared, list) else [declared])

    def _need_plain_cache(self, what: str) -> None:
        if not self.cache.plain:
            raise ConfigError(
                f"{what} needs cache='dynamic' without a window, got {self.cache.kind!r} with"
                f" window {self.cache.window}"
            )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value
