"""The held-out loss: nats per token and, of text, bits per byte.

Bits per byte is comparable across tokenizers: all nats the model spent, those on end-of-sequence
tokens included, over the UTF-8 bytes of the tokens it predicted. Every token but a document's first
is predicted exactly once (see `data.packing`), with what its row holds before it as context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core.losses import target_mask
from xoron_train.data.batches import to_device
from xoron_train.data.packing import Row, empty_row
from xoron_train.data.talks import Talk
from xoron_train.losses import sum_over_processes
from xoron_train.metrics import bits_per_byte

if TYPE_CHECKING:
    from accelerate import Accelerator

_PADDING = 2  # length of a row of nothing, beside conversations


@dataclass(frozen=True)
class Score:
    """Sums over held-out text and conversations.

    Attributes:
        nats: negative log-likelihood.
        tokens: predicted tokens.
        num_bytes: UTF-8 bytes of the tokens of text; 0 where the tokenizer is not byte-level.
        byte_nats: the part of `nats` that falls on text. What an assistant says is no part of it:
            its bytes are not those of a document.
    """

    nats: float = 0.0
    tokens: int = 0
    num_bytes: int = 0
    byte_nats: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            self.byte_nats + other.byte_nats,
        )

    def record(self) -> dict[str, Any]:
        """Plain data for metrics: `loss` in nats per token, `bits_per_byte` or None."""
        return {
            "loss": self.nats / max(1, self.tokens),
            "bits_per_byte": bits_per_byte(self.byte_nats, self.num_bytes),
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


def count_bytes(batch: Mapping[str, Tensor], bytes_of: Tensor | None) -> int:
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
    rows: Iterable[Row | Talk],
    *,
    batch_size: int,
    collate: Callable[[Sequence[Row | Talk]], dict[str, Any]],
    bytes_of: Tensor | None,
    accelerator: Accelerator,
    options: Mapping[str, Any] | None = None,
) -> Score:
    """Scores rows, shared out over the processes, without touching the training's randomness.

    Args:
        model: as prepared by the accelerator.
        rows: the same on every process.
        batch_size: rows per forward pass.
        collate: rows to a batch.
        bytes_of: (vocabulary,) bytes per token id, or None where bytes do not count.
        accelerator: its device and processes are used.
        options: of the model's forward.
    """
    share = batch_size * accelerator.num_processes
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    walk = iter(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        while group := list(itertools.islice(walk, share)):
            # Every process runs every round, on padding where the rows have run out.
            length = len(group[0].tokens) if isinstance(group[0], Row) else _PADDING
            group += [empty_row(length)] * (share - len(group))
            first = accelerator.process_index * batch_size
            batch = collate(group[first : first + batch_size])
            on_device = to_device(batch, accelerator.device)
            term = model(**on_device, **(options or {"use_cache": False})).losses["text"]
            sums += torch.tensor([float(term.sum), float(term.count), count_bytes(batch, bytes_of)])
    model.train(was_training)
    nats, tokens, size = sum_over_processes(sums, accelerator)
    return Score(nats, round(tokens), round(size), nats if size else 0.0)
