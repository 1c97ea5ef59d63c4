"""Placeholders in ids: spans for media that are given beside them, and none left without a medium.

`model(input_ids=..., images=...)`, the published form, says what the images are and leaves where
they stand to the ids: every run of the modality's placeholder is an image.

Footguns:
- Placeholders are positions. An image that takes 64 needs 64 of them; a single one is an error and
  never widened, since labels and masks have their lengths already. The processor writes them.
- A projector with budgets is asked for its config's budget here; for another one per batch, use the
  processor, which hands on `counts`.

Shapes: B rows, N positions, M items, K positions of an item, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xoron_core import fill
from xoron_core.components import Codec, Encoder, Features, Projector
from xoron_core.encode import media_loader
from xoron_core.errors import SequenceError

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

IMAGES = "image.encoder"
Media = Mapping[str, Mapping[str, Tensor]]


def with_images(
    model: XoronModel,
    media: Media | None,
    *,
    images: Any,
    input_ids: Tensor | None,
    slot: str = IMAGES,
) -> dict[str, Mapping[str, Tensor]]:
    """Adds images to a batch's media, at the placeholders of its ids.

    Args:
        model: the composed model.
        media: what else the batch holds, slot to tensors and `spans`.
        images: (M, ...) as the encoder takes its one tensor, such as (M, 3, H, W) pixel values; or
            a mapping of the tensors that it takes by name; or what the modality loads (a path, an
            array, a PIL image), or a list of that. None adds nothing.
        input_ids: (B, N); image i stands at the i-th run of placeholders, row by row. Runs may
            touch: they are cut by what each image takes.
        slot: of the encoder.

    Raises:
        PluginError: if the slot is empty, naming what to install.
        SequenceError: if images and placeholders differ in number, with both numbers.
    """
    entries = dict(media or {})
    if images is None:
        return entries
    if slot in entries:
        raise SequenceError(
            f"images were given twice, as `images` and as media[{slot!r}]; give one"
        )
    encoder: Encoder = model.part(slot)
    if input_ids is None:
        raise SequenceError(
            "images stand at the placeholders of input_ids, and there are none; to encode images"
            " alone, call model.encode(images)"
        )
    tensors, lengths = _tensors(model, slot, encoder, images)
    tensors = {name: tensor.to(input_ids.device) for name, tensor in tensors.items()}
    number = len(next(iter(tensors.values()), ()))
    string, placeholder = _placeholder(model, slot)
    runs = find_runs(_unfilled(placeholder, entries, input_ids))
    if lengths is None and len(runs) != number:
        lengths = _encoded_lengths(model, slot, encoder, tensors) if number else []
    spans = runs if lengths is None else _cut(runs, lengths)
    if spans is None and len(runs) == number:
        spans = runs  # `fill.inject` names the item and both its lengths
    if spans is None:
        total = int(runs[:, 2].sum())
        raise SequenceError(
            f"{slot}: {number} images take {sum(lengths or ())} positions, but input_ids hold"
            f" {total} {string!r} in {len(runs)} spans; write as many as each"
            " image takes between its markers, as the processor does"
        )
    if number:
        entries[slot] = {**tensors, fill.SPANS: spans}
    return entries


def check_filled(model: XoronModel, media: Media, *, input_ids: Tensor) -> None:
    """Refuses a placeholder that no medium fills, in a batch that holds media.

    Its row of the embedding is never trained, so that the model would read noise.

    Raises:
        SequenceError: with the number of placeholders and of positions that media fill.
    """
    for slot, entry in media.items():
        if fill.SPANS not in entry or isinstance(model.part(slot), Codec) or model.space is None:
            continue
        string, number = _placeholder(model, slot)
        left = int(_unfilled(number, media, input_ids).sum())
        if left:
            total = int((input_ids == number).sum())
            raise SequenceError(
                f"{slot}: the sequence has {total} {string!r}, but media fill {total - left} of"
                " them; give every placeholder its medium, or leave it out"
            )


def find_runs(mask: Tensor) -> Tensor:
    """(B, N) bool to (R, 3) int64: row, start and length of each stretch of True, row by row."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    after = torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    first, last = (mask & ~before).nonzero(), (mask & ~after).nonzero()
    return torch.cat([first, last[:, 1:] - first[:, 1:] + 1], dim=-1)


def _placeholder(model: XoronModel, slot: str) -> tuple[str, int]:
    """The placeholder of a slot's modality: its string and its id."""
    if model.space is None:
        raise SequenceError(
            f"{slot}: this composition has no tokenizer, so no id is a placeholder; compose one in,"
            " or give media with spans"
        )
    name = model.composition.slots[slot].modality
    string = model.modalities[name].placeholder
    return string, model.space.id_of(string)


def _unfilled(placeholder: int, media: Media, input_ids: Tensor) -> Tensor:
    """(B, N) bool: where a placeholder stands that no entry of `media` fills."""
    free = input_ids == placeholder
    for entry in media.values():
        if fill.SPANS in entry:
            places = fill.flat_positions(entry[fill.SPANS], input_ids.shape[1])
            free.view(-1)[places] = False
    return free


def _tensors(
    model: XoronModel, slot: str, encoder: Encoder, images: Any
) -> tuple[dict[str, Tensor], list[int] | None]:
    """The encoder's tensors, and how many positions each item takes where that is known yet."""
    if isinstance(images, Mapping):
        return dict(images), None
    if isinstance(images, Tensor):
        ((name, like), *more) = encoder.dummy_batch().items()
        if more:
            names = ", ".join([name, *(key for key, _ in more)])
            raise SequenceError(
                f"{slot}: this encoder takes several tensors ({names}), got one; give a mapping of"
                " them, or a list of files or arrays"
            )
        if images.ndim != like.ndim:
            raise SequenceError(
                f"{slot}: expected a tensor of {like.ndim} axes, items first, like"
                f" {tuple(like.shape)}; got {tuple(images.shape)}"
            )
        return {name: images}, None
    items = list(images) if isinstance(images, list | tuple) else [images]
    processor, load = media_loader(model, slot)
    loaded = [processor.load(load(item)) for item in items]
    counts = [processor.num_positions(item) for item in loaded]
    projector = model.slots.get(f"{slot.rpartition('.')[0]}.projector")
    if isinstance(projector, Projector):
        counts = [projector.num_positions(projector.config, count) for count in counts]
    return (processor.collate(loaded) if loaded else {}), counts


@torch.no_grad()
def _encoded_lengths(
    model: XoronModel, slot: str, encoder: Encoder, tensors: Mapping[str, Tensor]
) -> list[int]:
    """How many positions each item takes, found by encoding it: tensors alone do not tell."""
    tokens: Features = encoder(**tensors)
    projector = model.slots.get(f"{slot.rpartition('.')[0]}.projector")
    if isinstance(projector, Projector):
        tokens = projector(tokens)
    return [int(count) for count in tokens.mask.sum(-1)]


def _cut(runs: Tensor, lengths: Sequence[int]) -> Tensor | None:
    """(R, 3) runs to (M, 3) spans of these lengths, in order; None if they do not fit."""
    spans, left = [], iter(lengths)
    for row, start, size in runs.tolist():
        end = start + size
        while start < end:
            length = next(left, 0)
            if not 0 < length <= end - start:
                return None
            spans.append((row, start, length))
            start += length
    if next(left, None) is not None:
        return None
    return runs.new_tensor(spans).view(-1, 3)
