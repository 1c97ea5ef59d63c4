"""Media to features, outside any sequence: what an encoder sees, with or without its projector.

Needs neither a backbone nor a tokenizer.

Shapes: M items, L features of the longest (K positions behind a projector), E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xoron_core.components import Encoder, Features, Projector
from xoron_core.descriptors import resolve
from xoron_core.errors import CompositionError, SequenceError
from xoron_core.plugins import registry

if TYPE_CHECKING:
    from xoron_core.model import XoronModel


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
        batch_size: items at once.

    Returns:
        Values (M, L, E), padded to the longest, with mask, and positions where there are some.

    Raises:
        PluginError: if the slot is empty, naming what to install.
        CompositionError: if it holds no encoder.
        SequenceError: if no media are given.
    """
    encoder = model.part(slot)
    if not isinstance(encoder, Encoder):
        found = ", ".join(model.parts(Encoder)) or "no slot"
        raise CompositionError(f"slot {slot!r} holds no encoder; this model has them in: {found}")
    items = list(media) if isinstance(media, list | tuple) else [media]
    if not items:
        raise SequenceError("no media were given to encode; expected one or a list of them")
    processor = type(encoder).processor(encoder.config)
    modality = registry().modalities()[model.composition.slots[slot].modality]
    if processor is None:
        raise CompositionError(f"slot {slot!r}: this encoder takes no media by itself")
    load = resolve(modality.load)
    projector = model.slots.get(f"{slot.rpartition('.')[0]}.projector") if project else None
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        made = []
        for start in range(0, len(items), batch_size):
            loaded = [processor.load(load(item)) for item in items[start : start + batch_size]]
            batch = {name: t.to(device) for name, t in processor.collate(loaded).items()}
            features: Features = encoder(**batch)
            made.append(projector(features) if isinstance(projector, Projector) else features)
    finally:
        model.train(training)
    return join(made)


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
