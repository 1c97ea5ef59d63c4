"""Sums what parts observe in their forward passes over one optimizer step and all processes.

A part returns sums (how often each expert was chosen); they are added up over the accumulation
window here, over processes once per step, and handed to `after_optimizer_step`.

Footguns:
- Every process must observe the same tensors: they are sent as one vector without their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xoron_train.losses import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from xoron_core.model import XoronModel

Statistics = Mapping[str, Mapping[str, Tensor]]


class StepStatistics:
    """The running sum of one optimizer step: slot to name to tensor."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}

    def add(self, statistics: Statistics | None) -> None:
        """Adds what one forward pass observed."""
        for slot, named in (statistics or {}).items():
            for name, tensor in named.items():
                seen = tensor.detach()
                before = self._sums.get((slot, name))
                self._sums[slot, name] = seen if before is None else before + seen

    def total(self, accelerator: Accelerator) -> dict[str, dict[str, Tensor]]:
        """Sums over all processes, each of which must call this."""
        keys = sorted(self._sums)
        if not keys:
            return {}
        local = torch.cat([self._sums[key].flatten().cpu().double() for key in keys])
        values = torch.tensor(sum_over_processes(local, accelerator), dtype=torch.float64)
        result: dict[str, dict[str, Tensor]] = {}
        sizes = [self._sums[key].numel() for key in keys]
        for (slot, name), part in zip(keys, values.split(sizes), strict=True):
            result.setdefault(slot, {})[name] = part.view_as(self._sums[slot, name]).float()
        return result


def part_metrics(model: XoronModel, statistics: Statistics) -> dict[str, float]:
    """What the parts make of a step's statistics, as `slot/name`, for the log."""
    return {
        f"{slot}/{name}": value
        for slot, named in statistics.items()
        for name, value in model.part(slot).metrics(named).items()
    }
