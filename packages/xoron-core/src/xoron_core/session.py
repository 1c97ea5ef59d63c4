"""`Session`: messages in, typed events out.

One position per row and step goes through the backbone, with a cache: an id, or one of a
generator's query vectors. Rows of a batch are independent: each has its own random generator,
grammar state and end, so a row says the same alone and beside others.

For greedy text it agrees with transformers' `model.generate`, because cache, masks and warpers are
the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from xoron_core.events import Event, Finished, MediaOut, TextDelta
from xoron_core.grammar import Grammar, State
from xoron_core.model import XoronModel
from xoron_core.processor import Message, XoronProcessor
from xoron_core.sampling import Sampling, draw
from xoron_core.text_stream import TextStream


@dataclass
class _Row:
    """One conversation while it runs."""

    state: State
    text: TextStream
    queries: list[Tensor] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    tokens: int = 0
    done: bool = False


@dataclass(frozen=True)
class Reply:
    """All that one conversation got.

    Attributes:
        text: the whole text.
        media: (modality, media) in order.
        reason: why it ended.
        tokens: how many positions were generated.
    """

    text: str
    media: tuple[tuple[str, Any], ...]
    reason: str
    tokens: int


class Session:
    """Runs a model on conversations.

    Args:
        model: a composed model.
        processor: its processor.
    """

    def __init__(self, model: XoronModel, processor: XoronProcessor) -> None:
        self.model = model
        self.processor = processor

    def stream(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        makes: Sequence[str] = (),
        begin_with: str | None = None,
        show_hidden: bool = False,
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
            show_hidden: whether hidden blocks such as reasoning are part of the text.
            **template: for the chat template.

        Raises:
            PluginError: if the composition lacks what is asked for.
            SequenceError: if messages and media do not agree.
        """
        sampling = sampling or Sampling()
        self.model.need_backbone()
        batch = self._batch(messages, template)
        grammar = Grammar(
            self.model, self.processor.modalities, [*makes, *([begin_with] if begin_with else [])]
        )
        rows = [
            _Row(grammar.begin(begin_with), TextStream(self.processor, stop, show_hidden))
            for _ in range(len(batch["input_ids"]))
        ]
        return self._run(batch, rows, grammar, sampling, max_new_tokens)

    def generate(
        self, conversations: Sequence[Sequence[Message]] | Sequence[Message] | str, **options: Any
    ) -> list[Reply]:
        """As `stream`, collected: one `Reply` per conversation."""
        texts: dict[int, str] = {}
        media: dict[int, list[tuple[str, Any]]] = {}
        ends: dict[int, Finished] = {}
        for event in self.stream(conversations, **options):
            if isinstance(event, TextDelta):
                texts[event.row] = texts.get(event.row, "") + event.text
            elif isinstance(event, MediaOut):
                media.setdefault(event.row, []).append((event.modality, event.media))
            else:
                ends[event.row] = event
        return [
            Reply(texts.get(row, ""), tuple(media.get(row, ())), end.reason, end.tokens)
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
        rows: list[_Row],
        grammar: Grammar,
        sampling: Sampling,
        max_new_tokens: int,
    ) -> Iterator[Event]:
        device = self.model.device
        batch = _to(batch, device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        generators = _generators(sampling, len(rows), device)
        warpers = sampling.warpers()
        ends = self._ends()
        output = self.model(**batch, use_cache=True, logits_to_keep=1)
        while True:
            scores = _masked(output.logits[:, -1], [grammar.allowed(row.state) for row in rows])
            picks = draw(warpers(ids, scores), generators).tolist()
            steps: list[int | None] = []
            for index, row in enumerate(rows):
                query = grammar.waits_for_query(row.state)
                steps.append(None if row.done or query else picks[index])
                if not row.done:
                    yield from self._step(index, row, steps[-1], grammar, ends, max_new_tokens)
            if all(row.done for row in rows):
                return
            embeds, ids = self._next_inputs(rows, steps, ids)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            yield from self._take_queries(rows, steps, output.hidden, grammar, generators)

    def _step(
        self,
        index: int,
        row: _Row,
        token: int | None,
        grammar: Grammar,
        ends: set[int],
        limit: int,
    ) -> Iterator[Event]:
        """Takes one id into a row, or lets it go on to its next query (`token` None)."""
        row.tokens += 1
        if token is None:
            return
        before = row.state
        if before.slot is None and before.force is None and token in ends:
            yield from self._finish(index, row, "stop")
            return
        row.state = grammar.advance(before, token)
        if before.slot is not None and row.state.slot is None and row.codes:
            yield self._decode(index, row, before.slot, grammar)
        elif before.slot is not None and before.force is None:
            row.codes.append(token)
        elif before.slot is None and row.state.slot is None:
            text, stopped = row.text.push(token)
            if text:
                yield TextDelta(text, index)
            if stopped:
                yield from self._finish(index, row, "stop")
                return
        if row.tokens >= limit and row.state == State():
            yield from self._finish(index, row, "length")

    def _finish(self, index: int, row: _Row, reason: Any) -> Iterator[Event]:
        row.done = True
        if text := row.text.flush():
            yield TextDelta(text, index)
        yield Finished(reason, row.tokens, index)

    def _next_inputs(
        self, rows: list[_Row], steps: list[int | None], ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next position of every row: (B, 1, D) embeddings, and the ids so far with it."""
        pad = getattr(self.processor.tokenizer, "pad_token_id", None) or 0
        column = ids.new_tensor([[pad if step is None else step] for step in steps])
        embeds = self.model.need_backbone().embed(column)
        for index, (row, step) in enumerate(zip(rows, steps, strict=True)):
            if step is None and not row.done:
                queries = self.model.part(cast(str, row.state.slot)).queries()
                embeds[index, 0] = queries[row.state.step].to(embeds.dtype)
        return embeds, torch.cat([ids, column], dim=1)

    def _take_queries(
        self,
        rows: list[_Row],
        steps: list[int | None],
        hidden: Tensor,
        grammar: Grammar,
        generators: list[torch.Generator] | None,
    ) -> Iterator[Event]:
        """Collects the hidden states of query positions; a full set becomes a medium."""
        for index, row in enumerate(rows):
            if row.done or steps[index] is not None:
                continue
            slot = cast(str, row.state.slot)
            row.queries.append(hidden[index, -1])
            row.state = grammar.advance(row.state, None)
            if not grammar.waits_for_query(row.state):
                stacked = torch.stack(row.queries)[None]
                row.queries = []
                rng = generators[index] if generators else _fixed(hidden.device)
                media = self.model.call(slot, "sample", stacked, rng)
                yield MediaOut(grammar.outputs[slot].modality, media, index)

    def _decode(self, index: int, row: _Row, slot: str, grammar: Grammar) -> MediaOut:
        """A finished codec span to its medium."""
        output = grammar.outputs[slot]
        assert self.model.space is not None
        ids = torch.tensor(row.codes, device=self.model.device).view(-1, len(output.ranges))
        row.codes = []
        starts = [self.model.space.range(name).start for name in output.ranges]
        local = ids - torch.tensor(starts, device=ids.device)
        media = self.model.call(slot, "decode", local[None], [{}])
        return MediaOut(output.modality, media, index)

    def _ends(self) -> set[int]:
        declared = self.model.generation_config.eos_token_id
        return set(declared if isinstance(declared, list) else [declared])


def _masked(scores: Tensor, allowed: list[Tensor]) -> Tensor:
    """(B, V) logits with everything masked that a row's mask does not allow."""
    # Rows in the same state share one mask; a large vocabulary is then not copied per row.
    same = all(mask is allowed[0] for mask in allowed)
    mask = (allowed[0][None] if same else torch.stack(allowed)).to(scores.device)
    extra = scores.shape[-1] - mask.shape[-1]
    if extra:  # a pretrained matrix may have more rows than the space
        mask = torch.cat([mask, mask.new_zeros(len(mask), extra)], dim=1)
    return scores.masked_fill(~mask, float("-inf"))


def _generators(
    sampling: Sampling, rows: int, device: torch.device
) -> list[torch.Generator] | None:
    if sampling.temperature == 0:
        return None
    seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**62, ()).item())
    return [torch.Generator(device).manual_seed(seed) for _ in range(rows)]


def _fixed(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value
