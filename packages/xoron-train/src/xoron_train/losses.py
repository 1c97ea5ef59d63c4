"""From each loss's sum to one number to differentiate.

    total = sum over losses k of  weight_k * sum_k / count_k

where count_k is over every micro-batch of the optimizer step on every process. Each micro-batch
contributes its part of that total, so how the rows are split changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from xoron_core.components import LossTerm
from xoron_core.errors import ConfigError, XoronError, did_you_mean

if TYPE_CHECKING:
    from accelerate import Accelerator

    from xoron_core.model import XoronModel

Batch = Mapping[str, Any]


def global_counts(counts: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Sums every loss's count over all processes; one may have losses that another has not."""
    every = gather_object([sorted(counts)]) if accelerator.num_processes > 1 else [counts]
    names = sorted({name for some in every for name in some})
    local = torch.tensor([counts.get(name, 0.0) for name in names], dtype=torch.float64)
    return dict(zip(names, sum_over_processes(local, accelerator), strict=True))


def local_counts(model: XoronModel, window: Iterable[Batch]) -> dict[str, float]:
    """Returns every loss's count over this process's micro-batches, before any forward pass.

    Raises:
        XoronError: if the batches hold no loss at all.
    """
    totals: dict[str, float] = {}
    for batch in window:
        for name, count in model.loss_counts(batch).items():
            totals[name] = totals.get(name, 0.0) + float(count)
    if not totals:
        raise XoronError("the batches hold no loss: neither labels nor media with a loss")
    return totals


def sum_over_processes(values: Tensor, accelerator: Accelerator) -> list[float]:
    """Sums (K,) float64 values of every process, in an order that does not vary."""
    if accelerator.num_processes == 1:
        return values.tolist()
    gathered = accelerator.gather(values.to(accelerator.device))
    return gathered.view(accelerator.num_processes, -1).sum(0).tolist()


def check_weights(weights: Mapping[str, float], known: Iterable[str]) -> None:
    """Refuses a weight for a loss that does not exist.

    Raises:
        ConfigError: naming the closest loss and all there are.
    """
    known = list(known)
    for name in weights:
        if name not in known:
            raise ConfigError(
                f"loss_weights: this model and its batches have no loss {name!r}."
                f"{did_you_mean(name, known)} There are: {', '.join(known)}."
            )


def weighted(
    terms: Mapping[str, LossTerm], counts: Mapping[str, float], weights: Mapping[str, float]
) -> Tensor:
    """Returns one micro-batch's part of the window's loss.

    Args:
        terms: the model's losses of this micro-batch.
        counts: of the whole window on all processes.
        weights: per loss, 1 where not given.

    """
    parts = [
        # A loss that counts nothing still takes part, so that every process has every gradient.
        term.sum * (weights.get(name, 1.0) / counts[name] if counts.get(name) else 0.0)
        for name, term in terms.items()
    ]
    return torch.stack([part.float() for part in parts]).sum()


def check_counts(counted: Mapping[str, float], returned: Mapping[str, float]) -> None:
    """Compares what `loss_counts` promised with what the forward passes of a window returned.

    Raises:
        XoronError: naming the loss; dividing by a wrong count would scale its gradient silently.
    """
    for name in sorted({*counted, *returned}):
        before, after = counted.get(name, 0.0), returned.get(name, 0.0)
        if abs(before - after) > 1e-4 * max(1.0, abs(after)):
            raise XoronError(
                f"loss {name!r}: the model counted {before} before its forward passes and"
                f" {after} in them; the component's count and its loss must agree"
            )
