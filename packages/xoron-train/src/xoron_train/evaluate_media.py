"""The held-out losses of what learns from media alone: a mean per loss over all held-out media."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_train.data.batches import to_device
from xoron_train.data.stream import row_length
from xoron_train.data.talks import Talk
from xoron_train.losses import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class MediaScore:
    """Sums over held-out media.

    Attributes:
        items: media that were scored.
        terms: sum and count of each loss.
    """

    items: int = 0
    terms: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __add__(self, other: MediaScore) -> MediaScore:
        terms = dict(self.terms)
        for name, (total, count) in other.terms.items():
            before = terms.get(name, (0.0, 0.0))
            terms[name] = before[0] + total, before[1] + count
        return MediaScore(self.items + other.items, terms)

    def record(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """Plain data for metrics: `loss`, weighted as in training, `losses` by name, `items`."""
        means = {
            name: total / count if count else 0.0 for name, (total, count) in self.terms.items()
        }
        loss = sum(weights.get(name, 1.0) * mean for name, mean in means.items())
        return {"loss": loss, "losses": means, "items": self.items}


@torch.no_grad()
def evaluate_media(
    model: nn.Module,
    rows: Iterable[Talk],
    *,
    batch_size: int,
    collate: Callable[[Sequence[Talk]], dict[str, Any]],
    accelerator: Accelerator,
) -> MediaScore:
    """Scores media in evaluation mode, shared out over the processes.

    Args:
        model: as prepared by the accelerator.
        rows: the same on every process, each with media.
        batch_size: rows per forward pass.
        collate: rows to a batch.
        accelerator: its device and processes are used.
    """
    share, first = batch_size * accelerator.num_processes, accelerator.process_index * batch_size
    was_training = model.training
    model.eval()
    items, sums = 0, dict[str, Tensor]()
    walk = iter(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        while group := list(itertools.islice(walk, share)):
            own = group[first : first + batch_size]
            # Every process runs every round, without counting it where the rows have run out.
            batch = to_device(collate(own or group[:1]), accelerator.device)
            items += sum(map(row_length, group))
            for name, term in model(**batch, use_cache=False).losses.items():
                seen = torch.tensor([float(term.sum), float(term.count)], dtype=torch.float64)
                sums[name] = sums.get(name, torch.zeros_like(seen)) + seen * bool(own)
    model.train(was_training)
    names = sorted(sums)
    local = torch.cat([sums[name] for name in names]) if names else torch.zeros(0)
    found = sum_over_processes(local, accelerator)
    pairs = zip(found[::2], found[1::2], strict=True)
    return MediaScore(items, dict(zip(names, pairs, strict=True)))
