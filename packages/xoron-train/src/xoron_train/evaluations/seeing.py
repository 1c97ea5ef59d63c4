"""Does a model use what it is shown? Its loss on expected answers with and without the right media.

The loss alone hides blindness: a model can lower it by guessing from the text. So each conversation
is judged four times: with its own media, with those of another sample, and with features that are
zero or noise (see `interventions`). `shuffled` is the strictest of the three, because there media
of the same kind stay in place and only what they show is wrong.

A sample's loss is the mean in nats over what the assistant says in it; a comparison's figures are
means over samples. All of them are independent of the batch size, up to rounding.

The record:

    samples        conversations with media
    without_media  conversations that were left out, because they have none
    not_shuffled   conversations for whose media there are none to take: of a conversation that
                   shows and expects something else, and of the same length in the sequence
    loss           with the correct media
    shuffled, zeroed, noised, each with
      samples      how many were compared
      loss         under the intervention
      delta        by how much the loss is higher than with the correct media, over the same samples
      interval     of delta, 95 %, by bootstrap; samples that share a medium are drawn together
      wins         share of samples whose correct loss is the lower one; ties count half
      passed       where there is a gate
    passed         all gates
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from xoron_core.components import LossTerm
from xoron_core.errors import DataError, XoronError
from xoron_core.losses import text_loss
from xoron_core.media import write_codes
from xoron_core.sequence import Plan, collate
from xoron_train.conversation import Conversation
from xoron_train.data.batches import to_device
from xoron_train.evaluations.base import Evaluation
from xoron_train.evaluations.comparison import compare
from xoron_train.evaluations.config import Gate, Intervention, SeeingConfig
from xoron_train.evaluations.interventions import (
    Interventions,
    encoder_slots,
    judging,
    naming,
)

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class Seeing(Evaluation):
    """The evaluation `seeing`."""

    config: SeeingConfig

    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """See `evaluate_seeing`."""
        config = self.config
        return evaluate_seeing(
            model,
            processor,
            samples,
            slots=config.slots,
            gates={name: getattr(config, name) for name in get_args(Intervention)},
            batch_size=config.batch_size,
            seed=config.seed,
        )


def evaluate_seeing(
    model: XoronModel,
    processor: XoronProcessor,
    samples: Sequence[Conversation],
    *,
    slots: Sequence[str] = (),
    gates: Mapping[Intervention, Gate | None] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the loss with the correct media and without them.

    Nothing of the model is changed, not its mode and not the random state of torch either.

    Args:
        model: on any device, in any mode.
        processor: of the model.
        samples: conversations that end with what the assistant should say. Each is read more than
            once.
        slots: encoders whose media are replaced; empty for all.
        gates: by intervention; by default one on `shuffled`, of 0.10 nats and 80 % wins.
        batch_size: conversations at once.
        seed: of who gets whose media, of the noise and of the intervals.

    Returns:
        The record that this module describes.

    Raises:
        ConfigError: for a slot without an encoder.
        DataError: if fewer than two samples have media, if nothing can be shuffled, if a sample
            cannot be read or has nothing that the assistant says.
        XoronError: if a loss is not finite.
    """
    gates = {"shuffled": Gate()} if gates is None else gates

    def plan(index: int) -> Plan:
        with naming(samples[index]):
            return processor.plan(samples[index].messages, train=True)

    shown = Interventions(model, processor, plan, slots=encoder_slots(model, slots), seed=seed)
    with judging(model, seed=seed):
        correct, said = _correct(shown, samples, batch_size)
        shown.shuffle(said)
        kept = _comparable(shown)
        without = _without(shown, samples, batch_size)
    record: dict[str, Any] = {
        "samples": len(kept["zeroed"]),
        "without_media": len(samples) - len(kept["zeroed"]),
        "not_shuffled": len(kept["zeroed"]) - len(kept["shuffled"]),
        "loss": float(np.nanmean(correct)),
    }
    group = np.array(shown.group)
    for name, losses in without.items():
        of = kept[name]
        record[name] = compare(
            correct[of], losses[of], group=group[of], gate=gates.get(name), seed=seed
        )
    passed = [record[name]["passed"] for name in without if "passed" in record[name]]
    return record | ({"passed": all(passed)} if passed else {})


def _correct(
    shown: Interventions, samples: Sequence[Conversation], size: int
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """(n,) losses as they are, and the ids that the assistant says.

    Samples without media are not judged: their loss is NaN.
    """
    losses = np.full(len(samples), np.nan)
    said: list[tuple[int, ...]] = [()] * len(samples)
    for start in range(0, len(samples), size):
        plans = shown.read(range(start, min(start + size, len(samples))))
        if plans:
            with shown.observed():
                losses[list(plans)] = _losses(shown, samples, plans)
        for index, plan in plans.items():
            said[index] = tuple(plan.input_ids[plan.learned].tolist())
    return losses, said


def _comparable(shown: Interventions) -> dict[Intervention, list[int]]:
    """The samples that each intervention reaches.

    Raises:
        DataError: if that is not enough to compare.
    """
    total = len(shown.media)
    kept = {
        name: [index for index in range(total) if shown.reaches(name, index)]
        for name in get_args(Intervention)
    }
    if len(kept["zeroed"]) < 2:
        raise DataError(
            f"seeing compares what samples show: {len(kept['zeroed'])} of {total} conversations"
            f" have media for {', '.join(shown.slots) or 'an encoder'}; give two or more"
        )
    if not kept["shuffled"]:
        raise DataError(
            f"seeing: nothing can be shuffled between {len(kept['zeroed'])} conversations; give"
            " some that share no media, expect different answers and show media of the same length"
        )
    return kept


def _without(
    shown: Interventions, samples: Sequence[Conversation], size: int
) -> dict[Intervention, np.ndarray]:
    """(n,) losses under each intervention, in the same batches as `_correct` makes."""
    losses = {name: np.full(len(samples), np.nan) for name in get_args(Intervention)}
    for start in range(0, len(samples), size):
        batch = [i for i in range(start, min(start + size, len(samples))) if shown.media[i]]
        plans = {index: shown.plan(index) for index in batch}
        for name, found in losses.items() if batch else ():
            with shown.applied(name, batch):
                found[batch] = _losses(shown, samples, plans)
    return losses


def _losses(
    shown: Interventions, samples: Sequence[Conversation], plans: Mapping[int, Plan]
) -> list[float]:
    """Mean nats of each plan over what the assistant says."""
    batch = collate(
        list(plans.values()),
        pad_id=getattr(shown.processor.tokenizer, "pad_token_id", None) or 0,
        train=True,
        gather_items=shown.processor.collate_media,
    )
    losses = []
    for index, term in zip(plans, sample_losses(shown.model, batch), strict=True):
        name, count = samples[index].name, float(term.count)
        if not count:
            raise DataError(
                f"conversation {name!r}: the assistant says nothing in it; expected an answer at"
                " its end"
            )
        losses.append(float(term.sum) / count)
        if not math.isfinite(losses[-1]):
            raise XoronError(f"seeing: the loss on conversation {name!r} is {losses[-1]}")
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
