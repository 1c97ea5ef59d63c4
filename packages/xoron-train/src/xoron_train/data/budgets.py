"""How many positions media take in each micro-batch, where a projector leaves the choice.

A projector with nested budgets puts 16, 32 or 64 positions of one medium into a sequence. Training
draws one of them per micro-batch, from the recipe's seed, the step and the micro-batch's number in
it, so that neither the number of processes nor a resume changes which.

Conversations are laid out with the largest budget and cut down once their micro-batch is known: how
long a row is at most must not depend on which step it falls into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from xoron_core.components import Projector
from xoron_core.errors import ConfigError
from xoron_core.fill import COUNTS
from xoron_core.sequence import Plan
from xoron_train.data.order import choice

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

RANDOM = "random"


class Budgets:
    """The budgets of a recipe.

    Args:
        model: whose projectors they are for.
        declared: by slot, a number of positions or `random`.
        seed: of the draws.

    Raises:
        ConfigError: for a slot without a projector with budgets, or a number beyond it.
    """

    def __init__(
        self, model: XoronModel, declared: Mapping[str, int | str], *, seed: int = 0
    ) -> None:
        self.choices = {slot: _choices(model, slot, value) for slot, value in declared.items()}
        self.seed = seed

    @property
    def largest(self) -> dict[str, int]:
        """What conversations are laid out with, by slot."""
        return {slot: max(counts) for slot, counts in self.choices.items()}

    def draw(self, step: int, micro_batch: int) -> dict[str, int]:
        """The budgets of one micro-batch, by slot."""
        return {
            slot: counts[choice(len(counts), self.seed, "budget", slot, step, micro_batch)]
            for slot, counts in self.choices.items()
        }

    def each(self) -> list[tuple[str, int, dict[str, int]]]:
        """Every slot with each of its budgets, and all budgets then: the others at their largest.

        Slots without a choice are left out.
        """
        return [
            (slot, count, {**self.largest, slot: count})
            for slot, counts in self.choices.items()
            if len(counts) > 1
            for count in counts
        ]


def cut_down(plan: Plan, budgets: Mapping[str, int]) -> Plan:
    """The same conversation with fewer positions for its media.

    Args:
        plan: as laid out with larger budgets.
        budgets: by slot of the projector; only ever fewer positions than there are.
    """
    keep = torch.ones(len(plan.input_ids), dtype=torch.bool)
    spans, removed = [], 0
    for span in sorted(plan.spans, key=lambda span: span.start):
        start, count = span.start - removed, budgets.get(_projector_of(span.slot))
        if count is None or count >= span.length or COUNTS not in span.item:
            spans.append(replace(span, start=start))
            continue
        keep[span.start + count : span.start + span.length] = False
        removed += span.length - count
        item = {**span.item, COUNTS: count}
        spans.append(replace(span, start=start, length=count, item=item))
    return Plan(plan.input_ids[keep], plan.learned[keep], tuple(spans))


def _projector_of(slot: str) -> str:
    return f"{slot.rpartition('.')[0]}.projector"


def _choices(model: XoronModel, slot: str, value: int | str) -> tuple[int, ...]:
    part = model.part(slot)
    if not isinstance(part, Projector) or not part.budgeted:
        able = [name for name, p in model.parts(Projector).items() if p.budgeted]
        raise ConfigError(
            f"budgets.{slot}: {type(part).__name__} makes a fixed number of positions; slots with"
            f" budgets in this model: {', '.join(able) or 'none'}"
        )
    nested = tuple(sorted(set(getattr(part.config, "budgets", ()))))
    if value == RANDOM:
        if not nested:
            raise ConfigError(
                f"budgets.{slot}: random draws from the budgets that the projector was composed"
                f" with, and it has none; compose it with {slot}.budgets, e.g. [16, 32, 64]"
            )
        return nested
    assert isinstance(value, int)
    most = getattr(part.config, "num_tokens", value)
    if value > most:
        raise ConfigError(f"budgets.{slot}: {value} is more than its num_tokens {most}")
    return (value,)
