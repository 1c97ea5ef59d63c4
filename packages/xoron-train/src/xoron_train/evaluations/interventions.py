"""What is done to media, inside the ordinary forward pass, to learn whether they are used.

Hooks on the encoders, removed whatever happens, replace what goes into the projectors; sequence,
positions and masks stay as they are:

- `shuffled`: the encoder is given the medium of a sample that expects something else (see
  `shuffling`);
- `zeroed`: features are zero;
- `noised`: features are drawn from a Gaussian with mean and deviation, per channel, of the features
  of all samples. Those of one sample alone would still tell something about it.

Works for every encoder, of whatever modality, whose features a projector puts into the sequence,
and for every codec whose ids stand in it (see `code_interventions`). What the assistant makes is
expected of it and never replaced.

Footgun: what an encoder makes of a medium must not depend on what else is in the batch.

Shapes: M items of one call, L features of the longest, E feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core.components import Codec, Codes, Encoder, Features
from xoron_core.composer.parts import slot_seed
from xoron_core.errors import ConfigError, DataError, SequenceError
from xoron_core.fill import split_spans
from xoron_core.sequence import Plan, Span
from xoron_train.conversation import Conversation
from xoron_train.evaluations.code_interventions import (
    CodeCounts,
    exchanged,
    rewritten,
    shadowed,
)
from xoron_train.evaluations.config import Intervention
from xoron_train.evaluations.shuffling import Medium, Place, donors, groups

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

# What changes a part of a model, in place, until it is left.
Attach = Callable[[Any], AbstractContextManager[Any]]


@contextmanager
def judging(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Evaluation mode without gradient; modes and torch's random state are restored."""
    training = [module for module in model.modules() if module.training]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    many = device.type not in ("cpu", "mps", "meta")  # kinds of which a machine has several
    kind = device.type if many else "cuda"
    with torch.random.fork_rng([device] if many else [], device_type=kind), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def naming(sample: Conversation) -> Iterator[None]:
    """Names the conversation in errors about its messages and media."""
    try:
        yield
    except (DataError, SequenceError) as error:
        raise DataError(f"conversation {sample.name!r}: {error}") from None


def media_slots(model: XoronModel, chosen: Sequence[str]) -> tuple[str, ...]:
    """The chosen encoders and codecs, or all.

    Raises:
        ConfigError: for a slot that holds neither.
    """
    known = tuple(model.parts((Encoder, Codec)))
    if wrong := [slot for slot in chosen if slot not in known]:
        raise ConfigError(
            f"slots: no encoder or codec in {', '.join(wrong)}; this model has them in:"
            f" {', '.join(known) or 'no slot'}"
        )
    return tuple(chosen) or known


class Moments:
    """Mean and deviation of all features of a slot, per channel, summed in fp64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, features: Features) -> None:
        """Adds the valid features of one call."""
        values = features.values[features.mask].cpu().double()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    def draw(self, length: int, seed: int) -> Tensor:
        """(length, E) features with this mean and deviation, fp32, on the CPU."""
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        noise = torch.randn(length, len(mean), generator=torch.Generator().manual_seed(seed))
        return mean.float() + deviation.float() * noise


class Interventions:
    """Interventions on a list of samples, whose media are replaced whole or not at all.

    First `read` every sample once, under `observed` wherever the model runs; then `shuffle`; then
    apply what is wanted.

    Args:
        model: in evaluation mode.
        processor: of the model.
        plan: lays out the sample of an index. Called again for whoever is given its media: items
            are not held in memory.
        slots: encoders and codecs whose media are replaced.
        seed: of shuffling and noise.

    Attributes:
        media: of each sample that was read, in order.
        group: of each sample, after `shuffle`; those of one group share media.
        takes: of each sample, after `shuffle`: where its media are taken from, or None if one of
            them found no other.
    """

    def __init__(
        self,
        model: XoronModel,
        processor: XoronProcessor,
        plan: Callable[[int], Plan],
        *,
        slots: Sequence[str],
        seed: int,
    ) -> None:
        self.model, self.processor, self.plan = model, processor, plan
        self.slots, self.seed = tuple(slots), seed
        self.media: list[tuple[Medium, ...]] = []
        self.group: list[int] = []
        self._codecs = {slot: model.part(slot) for slot in slots if slot in model.parts(Codec)}
        self._moments = {slot: Moments() for slot in slots if slot not in self._codecs}
        self._counts = {slot: CodeCounts() for slot in self._codecs}
        self._read: list[dict[str, list[bool]]] = []  # of each codec's items, whether it is input
        self.takes: list[list[Place] | None] = []

    def read(self, indices: Iterable[int]) -> dict[int, Plan]:
        """Lays out the next samples and notes their media; returns those that have any."""
        plans = {}
        for index in indices:
            assert index == len(self.media), "samples are read once, in order"
            laid = self.plan(index)
            self.media.append(tuple(map(self._medium, self._spans(laid))))
            self._read.append(self._coded(laid))
            if self.media[index]:
                plans[index] = laid
        return plans

    def made(self, plan: Plan) -> tuple[str, ...]:
        """Digests of the media that the assistant is to make through a codec."""
        made = [span for span in plan.spans if plan.learned[span.start]]
        return tuple(item_digest(self.processor, span) for span in made)

    def observed(self) -> AbstractContextManager[None]:
        """Notes the features and codes of forward passes; noise imitates them."""
        noting = {slot: _after(m.add) for slot, m in self._moments.items()}
        counting = {slot: partial(shadowed, change=c.add) for slot, c in self._counts.items()}
        return _attached(self.model, noting | counting)

    def shuffle(self, expected: Sequence[Hashable]) -> None:
        """Settles whose media each sample is given: of one that expects something else."""
        self.group = groups(self.media)
        self.takes = donors(self.media, group=self.group, expected=expected, seed=self.seed)

    def reaches(self, name: Intervention, sample: int) -> bool:
        """Whether an intervention replaces the media of a sample: all of them, and some."""
        return bool(self.media[sample]) and (name != "shuffled" or self.takes[sample] is not None)

    def applied(self, name: Intervention, samples: Sequence[int]) -> AbstractContextManager[None]:
        """Intervenes in forward passes on a batch of exactly these samples, in this order."""
        places: dict[str, list[Place]] = {}
        for sample in samples:
            for number, medium in enumerate(self.media[sample]):
                places.setdefault(medium.slot, []).append(Place(sample, number))
        attach: dict[str, Attach] = {}
        for slot, wanted in places.items():
            if slot in self._codecs:
                changed = [flag for sample in samples for flag in self._read[sample][slot]]
                attach[slot] = self._recoded(name, slot, wanted, changed)
            elif name == "shuffled":
                attach[slot] = self._given(slot, wanted)
            else:
                change = {"zeroed": _zero, "noised": self._noise}[name]
                attach[slot] = _after(partial(change, wanted))
        return _attached(self.model, attach)

    def _spans(self, plan: Plan) -> list[Span]:
        """What is shown; of a codec's media the made ones are learned, and are no input."""
        return [s for s in plan.spans if s.slot in self.slots and not plan.learned[s.start]]

    def _coded(self, plan: Plan) -> dict[str, list[bool]]:
        return {
            slot: [not plan.learned[span.start] for span in plan.spans if span.slot == slot]
            for slot in self._codecs
        }

    def _medium(self, span: Span) -> Medium:
        return Medium(span.slot, span.length, item_digest(self.processor, span))

    def _taken(self, slot: str, places: Sequence[Place]) -> dict[str, Tensor]:
        """The media of others, as the part in `slot` takes them; who finds none keeps her own."""
        loaded: dict[int, list[Mapping[str, Any]]] = {}

        def item(place: Place) -> Mapping[str, Any]:
            taken = self.takes[place.sample]
            donor = place if taken is None else taken[place.medium]
            if donor.sample not in loaded:
                spans = self._spans(self.plan(donor.sample))
                loaded[donor.sample] = [span.item for span in spans]
            return loaded[donor.sample][donor.medium]

        tensors = _tensors(self.processor, slot, [item(place) for place in places])
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    def _given(self, slot: str, places: Sequence[Place]) -> Attach:
        """Gives an encoder the media of others."""
        given = self._taken(slot, places)

        def hook(_module: nn.Module, args: Any, _media: Any) -> tuple[Any, Any]:
            return args, given

        return lambda encoder: _removed(encoder.register_forward_pre_hook(hook, with_kwargs=True))

    def _recoded(
        self, name: Intervention, slot: str, places: Sequence[Place], changed: Sequence[bool]
    ) -> Attach:
        """Exchanges the codes of what a codec reads; `changed` says which items of a call."""

        def zero(_index: int, steps: int) -> Tensor:
            return torch.zeros(steps, len(self._counts[slot].counts), dtype=torch.int64)

        def noise(index: int, steps: int) -> Tensor:
            return self._counts[slot].draw(steps, self._seed(slot, places[index]))

        if name == "shuffled":
            given: Codes = self._codecs[slot].encode(**self._taken(slot, places))
            return partial(shadowed, change=partial(exchanged, changed=changed, given=given))
        new = zero if name == "zeroed" else noise
        return partial(shadowed, change=partial(rewritten, changed=changed, new=new))

    def _noise(self, places: Sequence[Place], features: Features) -> Features:
        """Noise of each place's own seed, so that the batch it falls into does not matter."""
        values = torch.zeros(features.values.shape)
        for row, valid, place in zip(values, features.mask.cpu(), places, strict=True):
            slot = self.media[place.sample][place.medium].slot
            drawn = self._moments[slot].draw(int(valid.sum()), self._seed(slot, place))
            row[valid] = drawn
        return features._replace(values=values.to(features.values))

    def _seed(self, slot: str, place: Place) -> int:
        return slot_seed(self.seed, f"{slot}/{place.sample}/{place.medium}")


def _zero(_places: Sequence[Place], features: Features) -> Features:
    return features._replace(values=torch.zeros_like(features.values))


def _after(change: Callable[[Features], Features | None]) -> Attach:
    """Runs behind an encoder; what it returns, if anything, takes the features' place."""

    def hook(_module: nn.Module, _args: Any, features: Features) -> Features | None:
        return change(features)

    return lambda encoder: _removed(encoder.register_forward_hook(hook))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attached(model: XoronModel, attach: Mapping[str, Attach]) -> Iterator[None]:
    with ExitStack() as stack:
        for slot, to in attach.items():
            stack.enter_context(to(model.part(slot)))
        yield


def _tensors(processor: XoronProcessor, slot: str, items: Any) -> dict[str, Tensor]:
    """Items to what the encoder is called with."""
    return split_spans(processor.collate_media(slot, items))[1]


def item_digest(processor: XoronProcessor, span: Span) -> str:
    """A hash of what the part in a span's slot is given."""
    tensors = _tensors(processor, span.slot, [span.item])
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
