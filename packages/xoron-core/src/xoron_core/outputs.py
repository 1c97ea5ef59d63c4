"""What `XoronModel.forward` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from xoron_core.components import LossTerm


@dataclass
class XoronOutput(ModelOutput):
    """Shapes: B rows, N positions, V rows of the token space, D backbone width.

    Attributes:
        loss: mean of every loss of this batch, unweighted and summed over losses; a trainer that
            accumulates uses `losses` instead.
        logits: (B, N or kept, V) where no labels are given.
        past_key_values: the cache.
        hidden: (B, N, D), the backbone's last hidden states.
        losses: name to `LossTerm`.
        outputs: slot to what that component's `forward` gave, for slots outside the sequence.
        statistics: slot to name to sums; add them up over a step, then `after_optimizer_step`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden: torch.Tensor | None = None
    losses: Mapping[str, LossTerm] | None = None
    outputs: Mapping[str, Any] | None = None
    statistics: Mapping[str, Mapping[str, torch.Tensor]] | None = None
