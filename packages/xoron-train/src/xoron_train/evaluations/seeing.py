"""Does a model use what it is shown? Its loss on expected answers with and without the right media.

The loss alone hides blindness: a model can lower it by guessing from the text. So each conversation
is judged four times: with its own media, with those of another sample, and with features (of media
that are ids: codes) that are zero or noise, see `interventions`. `shuffled` is the strictest of the
three, because there media of the same kind stay in place and only what they show is wrong.

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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from xoron_core.errors import DataError
from xoron_core.sequence import Plan
from xoron_train.conversation import Conversation, has_media
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.comparison import compare, comparison_checks
from xoron_train.evaluations.config import Gate, Intervention, SeeingConfig
from xoron_train.evaluations.interventions import (
    Interventions,
    judging,
    media_slots,
    naming,
)
from xoron_train.evaluations.plan_losses import plan_losses

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

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """Wins and delta of each comparison that has a gate."""
        gates = {name: getattr(self.config, name) for name in get_args(Intervention)}
        return [
            check
            for name, gate in gates.items()
            if gate is not None
            for check in comparison_checks(name, record[name], gate)
        ]

    def suits(self, sample: Conversation) -> bool:
        """Whether media are shown in it, and the assistant says or makes something."""
        return any(
            has_media(message) for message in sample.messages if message["role"] != "assistant"
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
        slots: encoders and codecs whose media are replaced; empty for all.
        gates: by intervention; by default one on `shuffled`, of 0.10 nats and 80 % wins.
        batch_size: conversations at once.
        seed: of who gets whose media, of the noise and of the intervals.

    Returns:
        The record that this module describes.

    Raises:
        ConfigError: for a slot without an encoder or codec.
        DataError: if fewer than two samples have media, if nothing can be shuffled, if a sample
            cannot be read or has nothing that the assistant says.
        XoronError: if a loss is not finite.
    """
    gates = {"shuffled": Gate()} if gates is None else gates

    def plan(index: int) -> Plan:
        with naming(samples[index]):
            return processor.plan(samples[index].messages, train=True)

    shown = Interventions(model, processor, plan, slots=media_slots(model, slots), seed=seed)
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
) -> tuple[np.ndarray, list[tuple[int | str, ...]]]:
    """(n,) losses as they are, and the ids and digests of media that the assistant says.

    Samples without media are not judged: their loss is NaN.
    """
    losses = np.full(len(samples), np.nan)
    said: list[tuple[int | str, ...]] = [()] * len(samples)
    for start in range(0, len(samples), size):
        plans = shown.read(range(start, min(start + size, len(samples))))
        if plans:
            with shown.observed():
                losses[list(plans)] = _losses(shown, samples, plans)
        for index, plan in plans.items():
            said[index] = (*plan.input_ids[plan.learned].tolist(), *shown.made(plan))
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
            f" have media for {', '.join(shown.slots) or 'an encoder or a codec'}; give two or more"
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
    names = [samples[index].name for index in plans]
    return plan_losses(shown.model, shown.processor, list(plans.values()), names=names)
