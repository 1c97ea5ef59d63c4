"""The decoding loop: logits to ids to events, one position per row and step.

A position is an id, or one of a generator's query vectors. Rows of a batch are independent: each
has its own random generator, grammar state and end. `xoron_core.speculative` runs several
positions per step with the same parts.

Shapes: B rows, C columns so far, V rows of the logits, D backbone width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from xoron_core.caches import Lane
from xoron_core.confidence import answer_confidence
from xoron_core.events import Event, Finished, MediaOut, TextDelta, TokenInfo, Usage
from xoron_core.grammar import Grammar, State
from xoron_core.sampling import Sampling, draw
from xoron_core.text_stream import Piece, TextStream


@dataclass
class Row:
    """One conversation while it runs."""

    state: State
    text: TextStream
    queries: list[Tensor] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    done: bool = False


class Decoder:
    """The rows of one request.

    Args:
        lane: the model, with whatever is cached.
        rows: the conversations.
        grammar: what may follow.
        sampling: how ids are chosen.
        limit: ids and queries per row; an open media span is still finished.
        ends: ids that end a row.
        pad: an id for columns that are no id of a row.
        details: whether to give `TokenInfo`.
        ids, mask: (B, C), the prompt's columns.
        keys: what stands at each column of a single row, for a prefix cache.
        reused: positions of the prompt that were cached.
    """

    def __init__(
        self,
        lane: Lane,
        rows: list[Row],
        *,
        grammar: Grammar,
        sampling: Sampling,
        limit: int,
        ends: set[int],
        pad: int,
        details: bool,
        ids: Tensor,
        mask: Tensor,
        keys: Sequence[Hashable] = (),
        reused: int = 0,
    ) -> None:
        self.lane, self.rows, self.grammar = lane, rows, grammar
        self.limit, self.ends, self.pad, self.details = limit, ends, pad, details
        self.ids, self.mask, self.keys, self.reused = ids, mask, list(keys), reused
        made = {output.modality for output in grammar.outputs.values()}
        self.choices = {name: sampling.of(name) for name in (None, *made)}
        self.warpers = {name: choice.warpers() for name, choice in self.choices.items()}
        greedy = all(choice.temperature == 0 for choice in self.choices.values())
        self.generators = None if greedy else _generators(sampling, len(rows), ids.device)

    def run(self, logits: Tensor) -> Iterator[Event]:
        """Decodes until every row has ended, from the (B, 1, V) logits of the prompt."""
        while True:
            scores = self.allowed(logits[:, -1])
            picks = self.choose(scores)
            infos = self.certainty(scores, picks)
            steps: list[int | None] = []
            for index, token in enumerate(picks.tolist()):
                row = self.rows[index]
                query = self.grammar.waits_for_query(row.state)
                steps.append(None if row.done or query else token)
                if not row.done:
                    yield from self.take(index, steps[-1], infos[index])
            if all(row.done for row in self.rows):
                return
            output = self.lane.run(self.mask_after(1), inputs_embeds=self._next_inputs(steps))
            yield from self._take_queries(steps, output.hidden)
            logits = output.logits

    # choosing

    def allowed(self, scores: Tensor) -> Tensor:
        """(B, V) logits with everything masked that a row's state does not allow."""
        masks = [self.grammar.allowed(row.state) for row in self.rows]
        # Rows in the same state share one mask; a large vocabulary is then not copied per row.
        same = all(mask is masks[0] for mask in masks)
        mask = (masks[0][None] if same else torch.stack(masks)).to(scores.device)
        extra = scores.shape[-1] - mask.shape[-1]
        if extra:  # a pretrained matrix may have more rows than the space
            mask = torch.cat([mask, mask.new_zeros(len(mask), extra)], dim=1)
        return scores.masked_fill(~mask, float("-inf"))

    def choose(self, scores: Tensor) -> Tensor:
        """One id per row, (B,), from its allowed scores and by the settings of its modality."""
        scores = self.warp(scores)
        if self.generators is None:
            return draw(scores, None)
        greedy = [self.choices[name].temperature == 0 for name in self._modalities()]
        pairs = zip(greedy, self.generators, strict=True)
        return draw(scores, [None if is_greedy else rng for is_greedy, rng in pairs])

    def warp(self, scores: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, V) scores after penalty and truncation, given the columns before them."""
        if not any(self.warpers.values()):
            return scores
        ids = self.ids if ids is None else ids
        mask = self.mask if mask is None else mask
        # A column that is not the row's must not be penalised: its first own id stands there.
        own = ids.gather(1, mask.argmax(-1, keepdim=True))
        ids = torch.where(mask != 0, ids, own)
        modalities = self._modalities()
        if len(set(modalities)) == 1:
            return cast(Tensor, self.warpers[modalities[0]](ids, scores))
        warped = scores.clone()
        for name in set(modalities):
            rows = [index for index, other in enumerate(modalities) if other == name]
            warped[rows] = self.warpers[name](ids[rows], scores[rows])
        return warped

    def _modalities(self) -> list[str | None]:
        """What each row's next id is part of."""
        return [self.grammar.modality(row.state) for row in self.rows]

    def certainty(self, scores: Tensor, picks: Tensor) -> Sequence[tuple[float, float] | None]:
        """Log-probability and entropy, in nats, of each row's pick among the allowed ids."""
        if not self.details:
            return [None] * len(self.rows)
        logprobs = scores.float().log_softmax(-1)
        chosen = logprobs.gather(1, picks[:, None])[:, 0]
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        return list(zip(chosen.tolist(), entropy.tolist(), strict=True))

    # columns

    def mask_after(self, columns: int) -> Tensor:
        """Adds columns that every row that still runs owns; gives the whole (B, C) mask."""
        runs = self.mask.new_ones(len(self.rows), columns)
        self.mask = torch.cat([self.mask, runs], dim=1)
        return self.mask

    def _next_inputs(self, steps: list[int | None]) -> Tensor:
        """The next position of every row as (B, 1, D) embeddings."""
        column = self.ids.new_tensor([[self.pad if step is None else step] for step in steps])
        self.ids = torch.cat([self.ids, column], dim=1)
        self.keys.append(object() if steps[0] is None else steps[0])
        model = self.lane.model
        embeds = model.need_backbone().embed(column)
        for index, (row, step) in enumerate(zip(self.rows, steps, strict=True)):
            if step is None and not row.done:
                queries = model.part(cast(str, row.state.slot)).queries()
                embeds[index, 0] = queries[row.state.step].to(embeds.dtype)
        return embeds

    # events

    def take(
        self, index: int, token: int | None, info: tuple[float, float] | None = None
    ) -> Iterator[Event]:
        """Takes one id into a row, or lets it go on to its next query (`token` None)."""
        row = self.rows[index]
        row.tokens += 1
        if token is None:
            return
        before = row.state
        is_end = before.slot is None and before.force is None and token in self.ends
        pieces: list[Piece] = []
        stopped = False
        was_hidden = row.text.hidden
        if not is_end:
            row.state = self.grammar.advance(before, token)
            if before.slot is None and row.state.slot is None:
                pieces, stopped = row.text.push(token)
        if info is not None:
            text = before == State() and row.state == State()
            answer = text and not was_hidden and not row.text.hidden
            if answer:
                row.logprobs.append(info[0])
            yield TokenInfo(token, *info, answer, index)
        for text_piece, hidden in pieces:
            yield TextDelta(text_piece, index, hidden)
        if is_end or stopped:
            yield from self._finish(index, "stop")
            return
        if before.slot is not None and row.state.slot is None and row.codes:
            yield self._decode(index, before.slot)
        elif before.slot is not None and before.force is None:
            row.codes.append(token)
        if row.tokens >= self.limit and row.state == State():
            yield from self._finish(index, "length")

    def _finish(self, index: int, reason: Literal["stop", "length"]) -> Iterator[Event]:
        row = self.rows[index]
        row.done = True
        for text, hidden in row.text.flush():
            yield TextDelta(text, index, hidden)
        usage = Usage(self.lane.positions, self.reused, self.lane.steps, row.drafted, row.accepted)
        yield Finished(reason, row.tokens, index, answer_confidence(row.logprobs), usage)

    def _take_queries(self, steps: list[int | None], hidden: Tensor) -> Iterator[Event]:
        """Collects the hidden states of query positions; a full set becomes a medium."""
        for index, row in enumerate(self.rows):
            if row.done or steps[index] is not None:
                continue
            slot = cast(str, row.state.slot)
            row.queries.append(hidden[index, -1])
            row.state = self.grammar.advance(row.state, None)
            if not self.grammar.waits_for_query(row.state):
                stacked = torch.stack(row.queries)[None]
                row.queries = []
                fixed = torch.Generator(hidden.device).manual_seed(0)
                rng = self.generators[index] if self.generators else fixed
                media = self.lane.model.call(slot, "sample", stacked, rng)
                yield MediaOut(self.grammar.outputs[slot].modality, media, index)

    def _decode(self, index: int, slot: str) -> MediaOut:
        """A finished codec span to its medium."""
        row, model = self.rows[index], self.lane.model
        output = self.grammar.outputs[slot]
        assert output.layout is not None
        codes = output.layout.unflatten(torch.tensor(row.codes, device=model.device))
        row.codes = []
        media: Any = model.call(slot, "decode", codes[None], [{}])
        return MediaOut(output.modality, media, index)


def _generators(sampling: Sampling, rows: int, device: torch.device) -> list[torch.Generator]:
    seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**62, ()).item())
    step = int(sampling.vary_rows)
    return [torch.Generator(device).manual_seed(seed + row * step) for row in range(rows)]
