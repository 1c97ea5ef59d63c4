"""What the losses that judge reconstructions have in common: which images, beside which originals.

Shapes: M images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from xoron_core.components import Autoencoder, Codec, Context
from xoron_core.errors import CompositionError
from xoron_core.fill import SPANS


class Pair(NamedTuple):
    """Attributes: reconstruction and original, each (M, 3, H, W) from -1 to 1."""

    reconstruction: Tensor
    original: Tensor


def check_judged(of: str, context: Context) -> None:
    """Refuses to judge a slot that makes no reconstructions.

    Raises:
        CompositionError: naming the slots that do.
    """
    makers = [s for s in context.parts if isinstance(context.parts[s], Autoencoder | Codec)]
    if of not in makers:
        raise CompositionError(
            f"slot {context.slot!r} judges the reconstructions of {of!r}, which holds no"
            f" autoencoder and no codec; there are: {', '.join(makers) or 'none'}. Set `of`"
        )


def original_of(of: str, batch: Mapping[str, Any]) -> Tensor | None:
    """The images (M, 3, H, W) that a slot trains on in a batch, or None."""
    entry = (batch.get("media") or {}).get(of)
    return None if not entry or SPANS in entry else entry["pixel_values"]


def pair_of(of: str, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Pair | None:
    """A slot's reconstructions beside their originals, or None where it did not run."""
    original = original_of(of, batch)
    if original is None or of not in outputs:
        return None
    return Pair(outputs[of]["reconstruction"], original)
