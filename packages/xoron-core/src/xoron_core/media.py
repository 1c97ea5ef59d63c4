"""Media inside `XoronModel.forward`: into embeddings before the backbone, to losses behind it.

Every trainable encoder, projector and generator runs once per training batch, on its dummy batch
where the batch has no media for it: otherwise a parameter's gradient would be None on one process
and zero on another.

Footgun: a medium with `spans` stands in the sequence; one without trains its codec or autoencoder
alone.

Shapes: B rows, N positions, D backbone width, M media items, K positions of an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from xoron_core import fill, losses
from xoron_core.components import (
    Autoencoder,
    Codec,
    Encoder,
    Features,
    Generator,
    LossTerm,
    Part,
    Projector,
)
from xoron_core.composer.parts import slot_seed
from xoron_core.errors import SequenceError
from xoron_core.placeholders import check_filled

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

Media = Mapping[str, Mapping[str, Tensor]]


class Embedded(NamedTuple):
    """What goes into the backbone.

    Attributes:
        embeds: (B, N, D).
        labels: (B, N) or None, codec ids written where they are learned.
        spans: (M, 3) row, start and length of every item that a projector filled, of all slots, or
            None where there is none.
    """

    embeds: Tensor
    labels: Tensor | None
    spans: Tensor | None


def embed(
    model: XoronModel,
    media: Media,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
) -> Embedded:
    """Ids and media to embeddings; placeholders of discrete media become ids, in labels too.

    Args:
        model: the composed model.
        media: slot to its tensors and `spans`.
        input_ids: (B, N), or `inputs_embeds` (B, N, D).
        labels: (B, N), -100 ignored.

    Raises:
        PluginError: for media of a slot that the model does not have.
        SequenceError: if spans and media do not agree.
    """
    for slot in media:
        model.part(slot)  # an unknown slot is an error, never ignored
    if input_ids is not None:
        input_ids, labels = write_codes(model, media, input_ids, labels)
    embeds = inputs_embeds
    if embeds is None:
        embeds = model.need_backbone().embed(cast(Tensor, input_ids))
    embeds, spans = _project(model, media, embeds)
    for slot, generator in model.parts(Generator).items():
        places, _ = fill.split_spans(media.get(slot, {}))
        if places is not None:
            queries = generator.queries().expand(len(places), -1, -1)
            mask = queries.new_ones(queries.shape[:2], dtype=torch.bool)
            embeds = fill.inject(embeds, places, Features(queries, mask), slot)
    if media and input_ids is not None:
        check_filled(model, media, input_ids=input_ids)
    return Embedded(embeds, labels, spans)


def write_codes(
    model: XoronModel, media: Media, input_ids: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Writes codec ids at the placeholders of discrete media, and into labels that are learned."""
    for slot, codec in model.parts(Codec).items():
        spans, tensors = fill.split_spans(media.get(slot, {}))
        if spans is None:
            continue
        assert model.space is not None
        with torch.no_grad():
            codes = codec.encode(**tensors)
        ranges = fill.codec_range_names(type(codec), codec.config)
        input_ids = fill.write_codes(
            input_ids, spans, codes, ranges=ranges, space=model.space, slot=slot
        )
        if labels is not None:
            labels = torch.where(labels != losses.IGNORE, input_ids, labels)
    return input_ids, labels


def generator_losses(
    model: XoronModel, hidden: Tensor, media: Media, seed: int | None
) -> dict[str, LossTerm]:
    """Each generator's loss on the (B, N, D) hidden states of its queries."""
    terms: dict[str, LossTerm] = {}
    for slot, generator in model.parts(Generator).items():
        rng = _rng(hidden.device, seed, slot)
        spans, tensors = fill.split_spans(media.get(slot, {}))
        if spans is not None:
            with torch.no_grad():
                target = generator.encode_target(**tensors)
            terms[slot] = generator.loss(fill.gather(hidden, spans, slot), target, rng)
        elif model.training and trainable(generator):
            dummy = _dummy(generator, hidden)
            with torch.no_grad():
                target = generator.encode_target(**dummy)
            queries = generator.queries().expand(len(target), -1, -1)
            term = generator.loss(queries + 0.0 * hidden.sum(), target, rng)
            terms[slot] = LossTerm(0.0 * term.sum, torch.zeros_like(term.count))
    return terms


def train_alone(model: XoronModel, media: Media) -> dict[str, Any]:
    """Runs codecs and autoencoders on media that stand in no sequence: their own training."""
    return {slot: part(**tensors) for slot, (part, tensors) in alone(model, media).items()}


def alone(model: XoronModel, media: Media) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Codecs and autoencoders with the media that stand in no sequence, by slot."""
    found = {}
    for slot, part in model.parts((Codec, Autoencoder)).items():
        spans, tensors = fill.split_spans(media.get(slot, {}))
        if tensors and spans is None:
            found[slot] = (part, tensors)
    return found


def trainable(part: nn.Module) -> bool:
    """Whether any of a part's parameters requires a gradient."""
    return any(parameter.requires_grad for parameter in part.parameters())


def _project(model: XoronModel, media: Media, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
    """Puts what encoders and projectors make of media at its positions."""
    places: list[Tensor] = []
    for slot, encoder in model.parts(Encoder).items():
        projector = model.slots.get(slot.rpartition(".")[0] + ".projector")
        spans, tensors = fill.split_spans(media.get(slot, {}))
        if not isinstance(projector, Projector):
            _refuse_media(slot, tensors, "no projector puts its features into the sequence")
            continue
        if spans is not None:
            counts = {key: media[slot][key] for key in (fill.COUNTS,) if key in media[slot]}
            tokens: Features = projector(encoder(**tensors), **counts)
            embeds = fill.inject(embeds, spans, tokens, slot)
            places.append(spans)
        elif tensors:
            _refuse_media(slot, tensors, "no spans say where they stand in the sequence")
        elif model.training and (trainable(encoder) or trainable(projector)):
            embeds = embeds + 0.0 * projector(encoder(**_dummy(encoder, embeds))).values.sum()
    return embeds, torch.cat(places) if places else None


def _refuse_media(slot: str, tensors: Mapping[str, Tensor], why: str) -> None:
    """Media that nothing reads are an error, never left out."""
    if tensors:
        raise SequenceError(f"media were given for {slot!r}, but {why}; see xoron_core.fill")


def _dummy(part: Part, like: Tensor) -> dict[str, Tensor]:
    return {name: tensor.to(like.device) for name, tensor in part.dummy_batch().items()}


def _rng(device: torch.device, seed: int | None, slot: str) -> torch.Generator:
    """A generator of its own for each slot, so that slots never share a stream."""
    base = int(torch.randint(2**62, ()).item()) if seed is None else seed
    return torch.Generator(device).manual_seed(slot_seed(base, slot))
