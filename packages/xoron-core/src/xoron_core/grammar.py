"""Which ids may follow, derived from the spans that a composition can make.

Text may hold ids of the text base and the special tokens of text. A begin marker of an allowed
modality opens an output span. A codec's span is whole frames of one id per codebook, in the order
that its delays give (`flattening`), then the end marker; a generator's span is its query positions,
which are no ids, then the end marker. Spans have bounded length, so that random weights produce no
illegal sequence and always end. `pieces` reads whole sequences by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xoron_core.components import Codec, Generator
from xoron_core.descriptors import Modality
from xoron_core.errors import ConfigError, PluginError, SequenceError
from xoron_core.fill import codec_range_names
from xoron_core.flattening import CodeLayout
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
        frames: how many frames a codec's span has, once its first codebook has ended.
    """

    slot: str | None = None
    step: int = 0
    force: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class _Output:
    modality: str
    begin: int
    end: int
    queries: int = 0
    layout: CodeLayout | None = None
    limits: tuple[int, int] = (0, 0)

    @property
    def positions(self) -> int:
        """The most positions between the markers."""
        return self.layout.num_codebooks * self.limits[1] if self.layout else self.queries


class Grammar:
    """The legal continuations of one request.

    Args:
        model: whose space, routes and components it follows.
        modalities: the modalities of the composition, by name.
        makes: those that this request may produce.
        frames: exactly how many frames a codec's span of a modality is to have; its `frame_limits`
            bound the others.

    Raises:
        PluginError: if the composition cannot make one of them.
        ConfigError: if a number of frames cannot be had.
    """

    def __init__(
        self,
        model: XoronModel,
        modalities: Mapping[str, Modality],
        makes: Iterable[str] = (),
        *,
        frames: Mapping[str, int] | None = None,
    ) -> None:
        assert model.space is not None
        self.space = model.space
        self.outputs: dict[str, _Output] = {}
        for name in makes:
            slot = route_slot(model.composition, name, "out", None)
            self.outputs[slot] = _describe(model, slot, modalities[name])
        for name, count in (frames or {}).items():
            self._fix_frames(name, count)
        self._text = text_rows(self.space)
        for output in self.outputs.values():
            self._text[output.begin] = True
        self._masks: dict[tuple[str, ...] | int, Tensor] = {}

    def _fix_frames(self, modality: str, count: int) -> None:
        for slot, output in self.outputs.items():
            if output.modality != modality or output.layout is None:
                continue
            least, most = output.limits
            if not least <= count <= most:
                raise ConfigError(
                    f"frames of {modality}: {slot} makes {least} to {most} frames, got {count}"
                )
            self.outputs[slot] = replace(output, limits=(count, count))
            return
        coded = ", ".join(o.modality for o in self.outputs.values() if o.layout) or "nothing"
        raise ConfigError(
            f"frames were given for {modality!r}, but this request makes {coded} through a codec"
        )

    @property
    def longest_span(self) -> int:
        """The most positions that one output span takes, markers included; 0 for text alone."""
        return max((output.positions + 2 for output in self.outputs.values()), default=0)

    def begin(self, modality: str | None) -> State:
        """The first state; with a modality, its begin marker is the only way to start."""
        if modality is None:
            return State()
        for output in self.outputs.values():
            if output.modality == modality:
                return State(force=output.begin)
        made = ", ".join(o.modality for o in self.outputs.values()) or "none"
        raise SequenceError(f"cannot begin with {modality!r}; this request makes: {made}")

    def modality(self, state: State) -> str | None:
        """The modality of the open span, or None in text."""
        return None if state.slot is None else self.outputs[state.slot].modality

    def waits_for_query(self, state: State) -> bool:
        """Whether the next position is a query of a generator, not an id."""
        if state.slot is None or state.force is not None:
            return False
        return state.step < self.outputs[state.slot].queries

    def allowed(self, state: State) -> Tensor:
        """(V,) bool, the ids that may follow; not to be changed."""
        if state.force is not None:
            return self._only(state.force)
        if state.slot is None:
            return self._text
        output = self.outputs[state.slot]
        if output.layout is None:
            return self._only(output.end)  # not chosen while it waits for a query
        follow = output.layout.follow(state.step, state.frames, limits=output.limits)
        if not follow.codebooks:
            return self._only(output.end)
        key = (state.slot, *map(str, follow))
        if key not in self._masks:
            mask = torch.zeros(self.space.size, dtype=torch.bool)
            for book in follow.codebooks:
                found = output.layout.ranges[book]
                mask[found.start : found.stop] = True
            mask[output.end] = follow.end
            self._masks[key] = mask
        return self._masks[key]

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
            output = self.outputs[state.slot]
            if token == output.end:
                return State()
            assert output.layout is not None
            frames = output.layout.frames_after(state.step, state.frames, token=token)
            return replace(state, step=state.step + 1, frames=frames)
        for slot, output in self.outputs.items():
            if token == output.begin:
                return State(slot=slot)
        return State()

    def _only(self, token: int) -> Tensor:
        if token not in self._masks:
            mask = torch.zeros(self.space.size, dtype=torch.bool)
            mask[token] = True
            self._masks[token] = mask
        return self._masks[token]


def _describe(model: XoronModel, slot: str, modality: Modality) -> _Output:
    assert model.space is not None
    part = model.part(slot)
    output = _Output(
        modality.name,
        begin=model.space.id_of(modality.gen_begin),
        end=model.space.id_of(modality.gen_end),
    )
    if isinstance(part, Codec):
        if part.needs_metadata(part.config):
            raise PluginError(
                f"{slot} reads {modality.name} but cannot make it: its codes do not decode without"
                f" what encoding measured; make {modality.name} with another codec or a generator"
            )
        layout = CodeLayout(model.space, codec_range_names(type(part), part.config))
        return replace(output, layout=layout, limits=part.frame_limits(part.config))
    if isinstance(part, Generator):
        return replace(output, queries=part.num_queries(part.config))
    return output
