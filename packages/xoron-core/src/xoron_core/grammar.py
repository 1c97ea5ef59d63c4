"""Which ids may follow, derived from the spans that a composition can make.

Text may hold ids of the text base and the special tokens of text. A begin marker of an allowed
modality opens an output span. A codec's span is whole steps of one id per codebook, in order, then
the end marker; a generator's span is its query positions, which are no ids, then the end marker.
Spans have bounded length, so that random weights produce no illegal sequence and always end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xoron_core.components import Codec, Generator
from xoron_core.descriptors import Modality
from xoron_core.errors import SequenceError
from xoron_core.fill import codec_range_names
from xoron_core.model import XoronModel
from xoron_core.sampling import text_rows
from xoron_core.sequence import route_slot


@dataclass(frozen=True)
class State:
    """Where a row stands.

    Attributes:
        slot: the component that makes the open span, or None in text.
        step: ids or queries of the open span so far.
        force: the only id that may follow, or None.
    """

    slot: str | None = None
    step: int = 0
    force: int | None = None


@dataclass(frozen=True)
class _Output:
    modality: str
    begin: int
    end: int
    queries: int
    ranges: tuple[str, ...]
    frames: tuple[int, int]


class Grammar:
    """The legal continuations of one request.

    Args:
        model: whose space, routes and components it follows.
        modalities: the modalities of the composition, by name.
        makes: those that this request may produce.

    Raises:
        PluginError: if the composition cannot make one of them.
    """

    def __init__(
        self, model: XoronModel, modalities: Mapping[str, Modality], makes: Iterable[str] = ()
    ) -> None:
        assert model.space is not None
        self.space = model.space
        self.outputs: dict[str, _Output] = {}
        for name in makes:
            slot = route_slot(model.composition, name, "out", None)
            self.outputs[slot] = _describe(model, slot, modalities[name])
        self._text = text_rows(self.space)
        for output in self.outputs.values():
            self._text[output.begin] = True
        self._ranges: dict[str, Tensor] = {}

    @property
    def longest_span(self) -> int:
        """The most positions that one output span takes, markers included; 0 for text alone."""
        return max(
            (o.queries + o.frames[1] * len(o.ranges) + 2 for o in self.outputs.values()), default=0
        )

    def begin(self, modality: str | None) -> State:
        """The first state; with a modality, its begin marker is the only way to start."""
        if modality is None:
            return State()
        for output in self.outputs.values():
            if output.modality == modality:
                return State(force=output.begin)
        made = ", ".join(o.modality for o in self.outputs.values()) or "none"
        raise SequenceError(f"cannot begin with {modality!r}; this request makes: {made}")

    def waits_for_query(self, state: State) -> bool:
        """Whether the next position is a query of a generator, not an id."""
        if state.slot is None or state.force is not None:
            return False
        return state.step < self.outputs[state.slot].queries

    def allowed(self, state: State) -> Tensor:
        """(V,) bool, the ids that may follow."""
        if state.force is not None:
            return self._only(state.force)
        if state.slot is None:
            return self._text
        output = self.outputs[state.slot]
        if self.waits_for_query(state):
            return self._only(output.end)  # not chosen: a query comes first
        codebook = state.step % len(output.ranges)
        frames = state.step // len(output.ranges)
        if codebook == 0 and frames >= output.frames[1]:
            return self._only(output.end)
        mask = self._range(output.ranges[codebook])
        if codebook == 0 and frames >= output.frames[0]:
            mask = mask | self._only(output.end)
        return mask

    def advance(self, state: State, token: int | None) -> State:
        """The state after an id, or after a query (`token` None).

        Raises:
            SequenceError: if the id is not allowed there.
        """
        if token is None:
            assert state.slot is not None
            output = self.outputs[state.slot]
            step = state.step + 1
            return replace(state, step=step, force=output.end if step == output.queries else None)
        if self.waits_for_query(state) or not bool(self.allowed(state)[token]):
            raise SequenceError(f"id {token} may not follow in state {state}")
        if state.slot is not None:
            if token == self.outputs[state.slot].end:
                return State()
            return replace(state, step=state.step + 1)
        for slot, output in self.outputs.items():
            if token == output.begin:
                return State(slot=slot)
        return State()

    def _only(self, token: int) -> Tensor:
        mask = torch.zeros(self.space.size, dtype=torch.bool)
        mask[token] = True
        return mask

    def _range(self, name: str) -> Tensor:
        if name not in self._ranges:
            found = self.space.range(name)
            mask = torch.zeros(self.space.size, dtype=torch.bool)
            mask[found.start : found.stop] = True
            self._ranges[name] = mask
        return self._ranges[name]


def _describe(model: XoronModel, slot: str, modality: Modality) -> _Output:
    assert model.space is not None
    part = model.part(slot)
    ranges: tuple[str, ...] = ()
    queries, frames = 0, (0, 0)
    if isinstance(part, Codec):
        ranges = tuple(codec_range_names(type(part), part.config))
        frames = part.frame_limits(part.config)
    elif isinstance(part, Generator):
        queries = part.num_queries(part.config)
    return _Output(
        modality.name,
        begin=model.space.id_of(modality.gen_begin),
        end=model.space.id_of(modality.gen_end),
        queries=queries,
        ranges=ranges,
        frames=frames,
    )
