"""Looks at a loaded model at work: does each medium change what comes out, and does what is trained
for it receive gradient? A modality that is blind loads, runs and trains without a word.

Media come from the modality's `sample`, or from the component's dummy batch with other values in
it: two media of equal size, so that a difference comes from what they hold.

Shapes: M items of a batch, K positions of an item, N positions of the row, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xoron_core.components import Autoencoder, Codec, Encoder, Features, Generator, Part, Projector
from xoron_core.descriptors import resolve
from xoron_core.doctor.finding import Finding
from xoron_core.fill import codec_range_names
from xoron_core.losses import IGNORE
from xoron_core.model import XoronModel
from xoron_core.plugins import registry
from xoron_core.processor import XoronProcessor

Media = dict[str, Tensor]


def examine_model(model: XoronModel, processor: XoronProcessor) -> Iterator[Finding]:
    """One finding per way in or out of the model."""
    patient = _Patient(model, processor)
    checks: list[tuple[str, Callable[[], Finding]]] = []
    if model.backbone is not None:
        checks.append((model.backbone.slot, patient.text))
    for kind, check in (
        (Encoder, patient.encoder),
        (Codec, patient.codec),
        (Autoencoder, patient.autoencoder),
        (Generator, patient.generator),
    ):
        checks += [(slot, partial(check, slot)) for slot in model.parts(kind)]
    for slot, run in checks:
        try:
            yield run()
        except Exception as error:  # noqa: BLE001 - a component may raise anything
            detail = f"fails on its own sample: {type(error).__name__}: {error}"
            yield Finding("live", slot, "wrong", detail, patient.report(slot))


class _Patient:
    """A model and the media it is shown."""

    def __init__(self, model: XoronModel, processor: XoronProcessor) -> None:
        self.model = model
        self.processor = processor

    def text(self) -> Finding:
        """Another first id gives other logits, and the backbone learns from it."""
        backbone = self.model.need_backbone()
        ids = torch.tensor([[0, 1, 2], [3, 1, 2]], device=self.model.device)
        logits = self._logits(ids, {})
        reached = self._gradient(logits, backbone)
        return self._verdict(backbone.slot, "logits", _differ(logits[:1], logits[1:]), [reached])

    def encoder(self, slot: str) -> Finding:
        """Another medium gives other logits; encoder and projector learn from it."""
        encoder = self.model.part(slot)
        stem = slot.rpartition(".")[0]
        projector = self.model.slots.get(f"{stem}.projector")
        first, second = self._media(slot)

        def run(media: Media) -> tuple[Tensor, Tensor]:
            features: Features = encoder(**media)
            tokens = projector(features) if isinstance(projector, Projector) else features
            return tokens.values * tokens.mask[..., None], tokens.mask.sum(-1)

        values, counts = run(first)
        if self.model.backbone is None or not isinstance(projector, Projector):
            reached = [self._gradient(values, encoder)]
            return self._verdict(slot, "features", _differ(values, run(second)[0]), reached)
        marks = self._marks(slot)
        ids, spans = _row(counts.tolist(), marks)
        one, two = (
            self._logits(ids, {slot: media | {"spans": spans}}) for media in (first, second)
        )
        reached = [self._gradient(one, encoder), self._gradient(one, projector)]
        return self._verdict(slot, "logits", _differ(one, two), reached)

    def codec(self, slot: str) -> Finding:
        """Another medium gives other codes and so other logits; their rows learn from it."""
        codec = self.model.part(slot)
        first, second = self._media(slot)
        with torch.no_grad():
            codes = codec.encode(**first)
            changed = _differ(codes.ids, codec.encode(**second).ids)
        if self.model.backbone is None or self.model.space is None:
            return self._verdict(slot, "codes", changed, [])
        names = codec_range_names(type(codec), codec.config)
        start = self.model.space.range(names[0]).start
        begin, end = self._marks(slot)[0], self._marks(slot)[2]
        counts = (codes.mask.sum(-1) * len(names)).tolist()
        ids, spans = _row(counts, (begin, start, end))
        one, two = (
            self._logits(ids, {slot: media | {"spans": spans}}) for media in (first, second)
        )
        reached = [self._gradient(one, self.model.get_input_embeddings())]
        return self._verdict(slot, "logits", changed and _differ(one, two), reached)

    def autoencoder(self, slot: str) -> Finding:
        """Another medium gives other latents."""
        part = self.model.part(slot)
        with torch.no_grad():
            one, two = (part.encode(**media) for media in self._media(slot))
        return self._verdict(slot, "latents", _differ(one, two), [])

    def generator(self, slot: str) -> Finding:
        """Another target gives another loss; generator and backbone learn from it."""
        generator = self.model.part(slot)
        first, second = self._media(slot, sampled=False)
        count = len(next(iter(first.values())))
        queries = type(generator).num_queries(generator.config)
        ids, spans = _row([queries] * count, self._marks(slot, "gen_begin", "gen_end"))
        labels = torch.full_like(ids, IGNORE)
        labels[0, -1] = ids[0, -1]
        one, two = (
            self._loss(slot, ids, labels, media | {"spans": spans}) for media in (first, second)
        )
        reached = [self._gradient(one, generator), self._gradient(one, self.model.need_backbone())]
        return self._verdict(slot, "loss", _differ(one, two), reached)

    def report(self, slot: str) -> str:
        """Who is to be told about a component at fault."""
        owner = self.model.composition.slots[slot].distribution
        return f"update {owner} or report it to its authors (`xoron plugins check` tells more)"

    def _logits(self, ids: Tensor, media: Mapping[str, Media]) -> Tensor:
        """(B, V) of the last position."""
        return self.model(input_ids=ids, media=media, use_cache=False).logits[:, -1].float()

    def _loss(self, slot: str, ids: Tensor, labels: Tensor, media: Media) -> Tensor:
        output = self.model(input_ids=ids, labels=labels, media={slot: media}, seed=0)
        return output.losses[slot].sum

    def _media(self, slot: str, *, sampled: bool = True) -> tuple[Media, Media]:
        """Two batches of equal shapes with different contents.

        A generator may make media of one size only, which its dummy batch has and a sample not.
        """
        modality = registry().modalities().get(self.model.composition.slots[slot].modality)
        part: Part = self.model.part(slot)
        taken = sampled and slot in self.processor.processors
        if taken and modality is not None and modality.sample:
            sample = resolve(modality.sample)
            pair = [self.processor.media_batch(slot, [sample(seed, 2)]) for seed in (0, 1)]
            if _same_size(*pair):
                return self._moved(pair[0]), self._moved(pair[1])
        first = part.dummy_batch()
        return self._moved(first), self._moved(_other(first))

    def _moved(self, media: Media) -> Media:
        return {name: tensor.to(self.model.device) for name, tensor in media.items()}

    def _marks(self, slot: str, begin: str = "begin", end: str = "end") -> tuple[int, int, int]:
        """Ids of the begin marker, the placeholder and the end marker; 0 without a space."""
        space = self.model.space
        name = self.model.composition.slots[slot].modality
        modality = registry().modalities().get(name)
        if space is None or modality is None:
            return 0, 0, 0
        strings = (getattr(modality, begin), modality.placeholder, getattr(modality, end))
        first, middle, last = (
            space.id_of(string) if string in space.special_ids else 0 for string in strings
        )
        return first, middle, last

    def _gradient(self, output: Tensor, part: nn.Module) -> tuple[str, bool | None]:
        """The part's slot and whether its parameters get gradient; None where all are frozen."""
        name = str(getattr(part, "slot", "the embedding"))
        parameters = [p for p in part.parameters() if p.requires_grad]
        if not parameters:
            return name, None
        if not output.requires_grad:
            return name, False
        gradients = torch.autograd.grad(
            output.float().square().sum(), parameters, retain_graph=True, allow_unused=True
        )
        return name, any(g is not None and bool(g.any()) for g in gradients)

    def _verdict(
        self, slot: str, what: str, changed: bool, reached: list[tuple[str, bool | None]]
    ) -> Finding:
        if not changed:
            detail = f"is blind: another medium gives the same {what}"
            return Finding("live", slot, "wrong", detail, self.report(slot))
        for name, gradient in reached:
            if gradient is False:
                detail = f"no parameter of {name} that is trained receives gradient"
                return Finding("live", slot, "wrong", detail, self.report(slot))
        said = [f"{name} {'learns' if g else 'is frozen'}" for name, g in reached]
        return Finding("live", slot, "ok", ", ".join([f"its medium changes the {what}", *said]))


def _row(counts: list[int], marks: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """All items in one row between their markers: ids (1, N) and spans (M, 3)."""
    begin, middle, end = marks
    ids, spans = [0], []
    for count in counts:
        ids.append(begin)
        spans.append([0, len(ids), count])
        ids += [middle] * count + [end]
    return torch.tensor([[*ids, 1]]), torch.tensor(spans)


def _differ(one: Tensor, two: Tensor) -> bool:
    return one.shape != two.shape or not torch.equal(one, two)


def _same_size(one: Media, two: Media) -> bool:
    """Whether shapes, masks and counts agree, so that only contents differ."""
    return all(
        one[name].shape == two[name].shape
        and (one[name].is_floating_point() or torch.equal(one[name], two[name]))
        for name in one
    )


def _other(media: Mapping[str, Any]) -> Media:
    """The same batch with other contents: noise on real numbers, bytes inverted."""
    rng = torch.Generator().manual_seed(0)
    other: Media = {}
    for name, tensor in media.items():
        if tensor.is_floating_point():
            other[name] = tensor + 4 * torch.randn(tensor.shape, generator=rng).to(tensor.dtype)
        else:
            other[name] = 255 - tensor if tensor.dtype == torch.uint8 else tensor
    return other
