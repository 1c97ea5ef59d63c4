"""Media to features, outside any sequence: what an encoder sees, with or without its projector.

Needs neither a backbone nor a tokenizer. One thread loads what comes next while the encoder runs.

Shapes: M items, L features of the longest (K positions behind a projector), E their width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xoron_core.components import Encoder, Features, MediaProcessor, Projector
from xoron_core.descriptors import resolve
from xoron_core.errors import CompositionError, SequenceError

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

# On a CPU towers of 196 to 729 patches took 1.04 to 1.09 times longer for eight images at once than
# for one to four, whose activations stay nearer to its cache.
CPU_FEATURES = 1024


@torch.no_grad()
def encode(
    model: XoronModel, media: Any, *, slot: str, project: bool = True, batch_size: int = 8
) -> Features:
    """Encodes media, in evaluation mode and without gradient.

    Args:
        model: the composed model.
        media: what the modality loads (a path, bytes, an array, ...), or a list of them.
        slot: of the encoder.
        project: whether to go on through the projector of the same modality, if there is one.
        batch_size: the most items at once, and how many are loaded ahead. On a CPU fewer, as many
            as have about `CPU_FEATURES` features.

    Returns:
        Values (M, L, E), padded to the longest, with mask, and positions where there are some.

    Raises:
        PluginError: if the slot is empty, naming what to install.
        CompositionError: if it holds no encoder.
        SequenceError: if no media are given, or batch_size is below 1.
    """
    if batch_size < 1:
        raise SequenceError(f"batch_size is {batch_size}, expected 1 or more")
    encoder = model.part(slot)
    if not isinstance(encoder, Encoder):
        found = ", ".join(model.parts(Encoder)) or "no slot"
        raise CompositionError(f"slot {slot!r} holds no encoder; this model has them in: {found}")
    items = list(media) if isinstance(media, list | tuple) else [media]
    if not items:
        raise SequenceError("no media were given to encode; expected one or a list of them")
    processor, load = media_loader(model, slot)
    projector = model.slots.get(f"{slot.rpartition('.')[0]}.projector") if project else None
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        made = []
        most = CPU_FEATURES if device.type == "cpu" else None
        loaded = load_ahead(lambda item: processor.load(load(item)), items, count=batch_size)
        for group in grouped(loaded, processor.num_positions, count=batch_size, features=most):
            batch = {name: t.to(device) for name, t in processor.collate(group).items()}
            features: Features = encoder(**batch)
            made.append(projector(features) if isinstance(projector, Projector) else features)
    finally:
        model.train(training)
    return join(made)


def media_loader(model: XoronModel, slot: str) -> tuple[MediaProcessor, Callable[[Any], Any]]:
    """The processor of the encoder in a slot, and what loads its modality's media.

    Raises:
        CompositionError: if this encoder has no processor.
    """
    encoder = model.part(slot)
    processor = type(encoder).processor(encoder.config)
    if processor is None:
        raise CompositionError(f"slot {slot!r}: this encoder takes no media by itself")
    modality = model.modalities[model.composition.slots[slot].modality]
    return processor, resolve(modality.load)


def load_ahead(
    load: Callable[[Any], dict[str, Any]], items: Iterable[Any], *, count: int
) -> Iterator[dict[str, Any]]:
    """What `load` makes of each item, in order; a thread is at most `count` items ahead.

    Raises:
        XoronError: what `load` raises, when its item's turn comes.
    """
    rest = iter(items)
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(load, item) for item in islice(rest, count))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(load, item) for item in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def grouped(
    items: Iterable[dict[str, Any]],
    num_positions: Callable[[dict[str, Any]], int],
    *,
    count: int,
    features: int | None,
) -> Iterator[list[dict[str, Any]]]:
    """Cuts items into groups, in order.

    Args:
        items: what a processor loaded.
        num_positions: features of an item.
        count: the most items of a group.
        features: the most features of a group, padded to its longest item; an item that has more
            is a group by itself. None is no limit.
    """
    group: list[dict[str, Any]] = []
    longest = 0
    for item in items:
        size = num_positions(item)
        longest = max(longest, size)
        full = features is not None and (len(group) + 1) * longest > features
        if group and (full or len(group) == count):
            yield group
            group, longest = [], size
        group.append(item)
    yield group


def join(made: Sequence[Features]) -> Features:
    """Features of several batches as one, padded to the longest with zeros."""
    longest = max(features.values.shape[1] for features in made)

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
        )

    values, mask = together([f.values for f in made]), together([f.mask for f in made])
    positions = [f.positions for f in made if f.positions is not None]
    return Features(values, mask, together(positions) if positions else None)
