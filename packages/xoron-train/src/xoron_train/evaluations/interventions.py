"""What is done to media features, inside the ordinary forward pass, to learn whether they are used.

Hooks on the encoders, removed whatever happens, replace what goes into the projectors; sequence,
positions and masks stay as they are:

- `shuffled`: the encoder is given the medium of a sample that expects something else (see
  `shuffling`);
- `zeroed`: features are zero;
- `noised`: features are drawn from a Gaussian with mean and deviation, per channel, of the features
  of all samples. Those of one sample alone would still tell something about it.

Works for every encoder, of whatever modality, whose features a projector puts into the sequence.

Footguns:
- Media that come in as ids of a codec pass through no encoder; they are not touched.
- What an encoder makes of a medium must not depend on what else is in the batch.

Shapes: M items of one call, L features of the longest, E feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core.components import Encoder, Features
from xoron_core.composer.parts import slot_seed
from xoron_core.errors import ConfigError, DataError, SequenceError
from xoron_core.fill import split_spans
from xoron_core.sequence import Plan, Span
from xoron_train.conversation import Conversation
from xoron_train.evaluations.config import Intervention
from xoron_train.evaluations.shuffling import Medium, Place, donors, groups

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

Attach = Callable[[nn.Module], Any]


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


def encoder_slots(model: XoronModel, chosen: Sequence[str]) -> tuple[str, ...]:
    """The chosen encoders, or all.

    Raises:
        ConfigError: for a slot that holds no encoder.
    """
    known = tuple(model.parts(Encoder))
    if wrong := [slot for slot in chosen if slot not in known]:
        raise ConfigError(
            f"slots: no encoder in {', '.join(wrong)}; this model has them in:"
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
        slots: encoders whose media are replaced.
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
        self._moments = {slot: Moments() for slot in slots}
        self.takes: list[list[Place] | None] = []

    def read(self, indices: Iterable[int]) -> dict[int, Plan]:
        """Lays out the next samples and notes their media; returns those that have any."""
        plans = {}
        for index in indices:
            assert index == len(self.media), "samples are read once, in order"
            laid = self.plan(index)
            self.media.append(tuple(map(self._medium, self._spans(laid))))
            if self.media[index]:
                plans[index] = laid
        return plans

    def observed(self) -> AbstractContextManager[None]:
        """Notes the features of forward passes; noise imitates them."""
        return _hooked(self.model, {slot: _after(m.add) for slot, m in self._moments.items()})

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
        if name == "shuffled":
            return self._swapped(places)
        change = {"zeroed": _zero, "noised": self._noise}[name]
        return _hooked(
            self.model, {slot: _after(partial(change, wanted)) for slot, wanted in places.items()}
        )

    def _spans(self, plan: Plan) -> list[Span]:
        return [span for span in plan.spans if span.slot in self.slots]

    def _medium(self, span: Span) -> Medium:
        tensors = _tensors(self.processor, span.slot, [span.item])
        return Medium(span.slot, span.length, _digest(tensors))

    def _swapped(self, places: Mapping[str, Sequence[Place]]) -> AbstractContextManager[None]:
        """Gives encoders the media of others; a sample that finds none keeps its own."""
        loaded: dict[int, list[Mapping[str, Any]]] = {}

        def item(place: Place) -> Mapping[str, Any]:
            taken = self.takes[place.sample]
            donor = place if taken is None else taken[place.medium]
            if donor.sample not in loaded:
                spans = self._spans(self.plan(donor.sample))
                loaded[donor.sample] = [span.item for span in spans]
            return loaded[donor.sample][donor.medium]

        def give(slot: str, wanted: Sequence[Place]) -> Attach:
            tensors = _tensors(self.processor, slot, [item(place) for place in wanted])
            given = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

            def hook(_module: nn.Module, args: Any, _media: Any) -> tuple[Any, Any]:
                return args, given

            return lambda encoder: encoder.register_forward_pre_hook(hook, with_kwargs=True)

        return _hooked(self.model, {slot: give(slot, wanted) for slot, wanted in places.items()})

    def _noise(self, places: Sequence[Place], features: Features) -> Features:
        """Noise of each place's own seed, so that the batch it falls into does not matter."""
        values = torch.zeros(features.values.shape)
        for row, valid, place in zip(values, features.mask.cpu(), places, strict=True):
            slot = self.media[place.sample][place.medium].slot
            seed = slot_seed(self.seed, f"{slot}/{place.sample}/{place.medium}")
            row[valid] = self._moments[slot].draw(int(valid.sum()), seed)
        return features._replace(values=values.to(features.values))


def _zero(_places: Sequence[Place], features: Features) -> Features:
    return features._replace(values=torch.zeros_like(features.values))


def _after(change: Callable[[Features], Features | None]) -> Attach:
    """Runs behind an encoder; what it returns, if anything, takes the features' place."""

    def hook(_module: nn.Module, _args: Any, features: Features) -> Features | None:
        return change(features)

    return lambda encoder: encoder.register_forward_hook(hook)


@contextmanager
def _hooked(model: XoronModel, attach: Mapping[str, Attach]) -> Iterator[None]:
    handles = []
    try:
        for slot, to in attach.items():
            handles.append(to(model.part(slot)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(processor: XoronProcessor, slot: str, items: Any) -> dict[str, Tensor]:
    """Items to what the encoder is called with."""
    return split_spans(processor.collate_media(slot, items))[1]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
