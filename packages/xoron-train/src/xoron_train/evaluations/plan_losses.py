"""The loss of single conversations as they are laid out, whatever batch they stand in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from xoron_core.components import LossTerm
from xoron_core.errors import DataError, XoronError
from xoron_core.losses import text_loss
from xoron_core.media import write_codes
from xoron_core.sequence import Plan, collate
from xoron_train.data.batches import to_device

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


def plan_losses(
    model: XoronModel, processor: XoronProcessor, plans: Sequence[Plan], *, names: Sequence[str]
) -> list[float]:
    """Mean nats of each plan over what is learned in it, in one batch.

    Args:
        model: in evaluation mode.
        processor: of the model.
        plans: as the processor lays conversations out to train.
        names: of the conversations, for errors.

    Raises:
        DataError: if nothing is learned in one of them.
        XoronError: if a loss is not finite.
    """
    batch = collate(
        plans,
        pad_id=getattr(processor.tokenizer, "pad_token_id", None) or 0,
        train=True,
        gather_items=processor.collate_media,
    )
    losses = []
    for name, term in zip(names, sample_losses(model, batch), strict=True):
        count = float(term.count)
        if not count:
            raise DataError(
                f"conversation {name!r}: the assistant says nothing in it; expected an answer at"
                " its end"
            )
        losses.append(float(term.sum) / count)
        if not math.isfinite(losses[-1]):
            raise XoronError(f"the loss on conversation {name!r} is {losses[-1]}")
    return losses


@torch.no_grad()
def sample_losses(model: XoronModel, batch: Mapping[str, Any]) -> list[LossTerm]:
    """The text loss of each row of a batch, as a sum in nats and a count.

    Args:
        model: in evaluation mode.
        batch: as the processor makes it to train, on any device.
    """
    moved = to_device(batch, model.device)
    documents = moved["document_ids"]
    _, written = write_codes(model, moved.get("media", {}), moved["input_ids"], moved.pop("labels"))
    labels = cast(Tensor, written)
    backbone = model.need_backbone()
    # Without labels the model makes logits; those of one position are the fewest it makes.
    hidden = cast(Tensor, model(**moved, use_cache=False, logits_to_keep=1).hidden)
    return [
        text_loss(
            hidden[row : row + 1],
            labels[row : row + 1],
            backbone.logits,
            head=backbone.linear_head(),
            document_ids=documents[row : row + 1],
        )
        for row in range(len(hidden))
    ]
