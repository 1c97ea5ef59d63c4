"""Held-out evaluation: nats per token and bits per byte.

Bits per byte is comparable across tokenizers: all nats the model spent, those on end-of-sequence
tokens included, over the UTF-8 bytes of the tokens it predicted. Every token but a document's first
is predicted exactly once (see `data.packing`), with what its row holds before it as context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core.losses import target_mask
from xoron_train.data.packing import Row, collate, empty_row
from xoron_train.losses import sum_over_processes
from xoron_train.metrics import bits_per_byte

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Score:
    """Sums over held-out text.

    Attributes:
        nats: negative log-likelihood.
        tokens: predicted tokens.
        num_bytes: UTF-8 bytes of those tokens; 0 where the tokenizer is not byte-level.
    """

    nats: float = 0.0
    tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats, self.tokens + other.tokens, self.num_bytes + other.num_bytes
        )

    def record(self) -> dict[str, Any]:
        """Plain data for metrics: `loss` in nats per token, `bits_per_byte` or None."""
        return {
            "loss": self.nats / max(1, self.tokens),
            "bits_per_byte": bits_per_byte(self.nats, self.num_bytes),
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


def count_bytes(batch: dict[str, Tensor], bytes_of: Tensor | None) -> int:
    """Returns the UTF-8 bytes of a batch's predicted tokens, 0 if they are not known.

    Args:
        batch: `labels` and `document_ids`, (B, N).
        bytes_of: (vocabulary,) bytes per token id, or None.
    """
    if bytes_of is None:
        return 0
    predicted = target_mask(batch["labels"], batch["document_ids"])
    return int(bytes_of[batch["labels"][:, 1:][predicted]].sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_token_id: int,
    bytes_of: Tensor | None,
    accelerator: Accelerator,
) -> Score:
    """Scores rows, shared out over the processes, without touching the training's randomness.

    Args:
        model: as prepared by the accelerator.
        rows: the same on every process.
        batch_size: rows per forward pass.
        pad_token_id: id at padding positions.
        bytes_of: (vocabulary,) bytes per token id, or None.
        accelerator: its device and processes are used.
    """
    share = batch_size * accelerator.num_processes
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, len(rows), share):
            # Every process runs every round, on padding where the rows have run out.
            group = list(rows[start : start + share])
            group += [empty_row(len(rows[0].tokens))] * (share - len(group))
            first = accelerator.process_index * batch_size
            mine = group[first : first + batch_size]
            batch = collate(mine, pad_token_id=pad_token_id)
            on_device = {key: value.to(accelerator.device) for key, value in batch.items()}
            term = model(**on_device, use_cache=False).losses["text"]
            sums += torch.tensor([float(term.sum), float(term.count), count_bytes(batch, bytes_of)])
    model.train(was_training)
    total = sum_over_processes(sums, accelerator)
    return Score(nats=total[0], tokens=round(total[1]), num_bytes=round(total[2]))
