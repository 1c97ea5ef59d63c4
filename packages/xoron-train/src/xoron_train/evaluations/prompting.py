"""Does a model make what it is asked for? Its loss on media with the right prompt and another's.

The counterpart of `seeing` for what comes out: the medium at a conversation's end stays, and what
stands before it is exchanged for what stands before another conversation's. A model that makes
plausible media whatever it is told has the same loss either way.

A sample's loss is the mean in nats over the ids of the media in the last message, of one codec or
several. Prompts change places only where they differ, in words or in what their media show.

The record:

    samples        conversations that end with media of a codec
    not_shuffled   conversations for whose prompt there was no other
    loss           with the correct prompt
    shuffled       with another prompt: samples, loss, delta, interval, wins as in `seeing`
    passed         where there is a gate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xoron_core.components import Codec
from xoron_core.errors import DataError
from xoron_core.sequence import Plan, media_parts
from xoron_train.conversation import Conversation, has_media
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.comparison import compare, comparison_checks
from xoron_train.evaluations.config import Gate, PromptingConfig
from xoron_train.evaluations.interventions import item_digest, judging, naming
from xoron_train.evaluations.plan_losses import plan_losses
from xoron_train.evaluations.shuffling import Medium, donors, groups

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class Prompting(Evaluation):
    """The evaluation `prompting`."""

    config: PromptingConfig

    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """See `evaluate_prompting`."""
        config = self.config
        return evaluate_prompting(
            model,
            processor,
            samples,
            gate=config.shuffled,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """Wins and delta, if there is a gate."""
        gate = self.config.shuffled
        return [] if gate is None else comparison_checks("shuffled", record["shuffled"], gate)

    def suits(self, sample: Conversation) -> bool:
        """Whether it ends with media of the assistant."""
        return ends_with_media(sample)


def ends_with_media(sample: Conversation) -> bool:
    """Whether the last message is the assistant's and holds media, behind a prompt."""
    *prompt, last = sample.messages
    return bool(prompt) and last["role"] == "assistant" and has_media(last)


def evaluate_prompting(
    model: XoronModel,
    processor: XoronProcessor,
    samples: Sequence[Conversation],
    *,
    gate: Gate | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the loss on media with their own prompts and with those of others.

    Nothing of the model is changed, not its mode and not the random state of torch either.

    Args:
        model: on any device, in any mode.
        processor: of the model.
        samples: conversations that end with media which a codec of the model makes.
        gate: what must be reached, or None.
        batch_size: conversations at once.
        seed: of who gets whose prompt and of the interval.

    Returns:
        The record that this module describes.

    Raises:
        DataError: if fewer than two samples have different prompts, if one cannot be read, does
            not end with media of a codec or has no prompt.
        XoronError: if a loss is not finite.
    """
    made = [_Made(model, processor, sample) for sample in samples]
    prompts = [(Medium("prompt", 0, one.prompt_digest()),) for one in made]
    group = groups(prompts)
    takes = donors(prompts, group=group, expected=group, seed=seed)
    kept = [index for index, taken in enumerate(takes) if taken is not None]
    if not kept:
        raise DataError(
            f"prompting: the prompts of {len(samples)} conversations are all the same; give some"
            " that ask for different things"
        )
    correct, without = np.zeros(len(made)), np.zeros(len(made))
    with judging(model, seed=seed):
        for start in range(0, len(made), batch_size):
            batch = list(range(start, min(start + batch_size, len(made))))
            correct[batch] = _losses(made, batch, [samples[i] for i in batch])
            there = [(index, taken[0].sample) for index in batch if (taken := takes[index])]
            if there:
                swapped, givers = (list(side) for side in zip(*there, strict=True))
                without[swapped] = _losses(made, swapped, [samples[i] for i in givers])
    record: dict[str, Any] = {
        "samples": len(made),
        "not_shuffled": len(made) - len(kept),
        "loss": float(correct.mean()),
        "shuffled": compare(
            correct[kept], without[kept], group=np.array(group)[kept], gate=gate, seed=seed
        ),
    }
    return record | ({} if gate is None else {"passed": record["shuffled"]["passed"]})


class _Made:
    """A conversation that ends with media, under its own prompt or another's.

    Args:
        model, processor: as for `evaluate_prompting`.
        sample: the conversation.

    Raises:
        DataError: if it does not end with media of a codec, or has no prompt.
    """

    def __init__(self, model: XoronModel, processor: XoronProcessor, sample: Conversation) -> None:
        self.model, self.processor, self.sample = model, processor, sample
        if not ends_with_media(sample):
            raise DataError(
                f"conversation {sample.name!r}: expected a prompt and then an assistant's message"
                " with media"
            )
        with naming(sample):
            self.media = len(media_parts(sample.messages[-1:], processor.modalities))

    def prompt_digest(self) -> str:
        """Equal where prompts are the same ids and show the same media."""
        with naming(self.sample):
            plan = self.processor.plan(self.sample.messages[:-1], add_generation_prompt=True)
            media = [item_digest(self.processor, span) for span in plan.spans]
        return f"{plan.input_ids.tolist()} {media}"

    def plan(self, giver: Conversation) -> Plan:
        """The conversation behind the prompt of another, learned only where its media stand."""
        with naming(self.sample):
            laid = self.processor.plan([*giver.messages[:-1], self.sample.messages[-1]], train=True)
            last = laid.spans[-self.media :]
            if foreign := [s.slot for s in last if not isinstance(self.model.part(s.slot), Codec)]:
                raise DataError(
                    f"its media are made by {foreign[0]}, which is no codec; only what is made as"
                    " ids has a loss that prompts can be compared by"
                )
        learned = torch.zeros_like(laid.learned)
        for span in last:
            learned[span.start : span.start + span.length] = True
        return replace(laid, learned=learned)


def _losses(
    made: Sequence[_Made], chosen: Sequence[int], givers: Sequence[Conversation]
) -> list[float]:
    """Mean nats of the media of some conversations, each under a prompt."""
    first = made[chosen[0]]
    plans = [made[index].plan(giver) for index, giver in zip(chosen, givers, strict=True)]
    names = [made[index].sample.name for index in chosen]
    return plan_losses(first.model, first.processor, plans, names=names)
