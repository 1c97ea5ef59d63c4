"""The text loss: next-token cross-entropy as a sum and a count.

Position n is trained on the label at n + 1. A label counts where it is not -100 and where both
positions belong to the same document, so that a packed row trains on exactly the pairs that its
documents have apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xoron_core.components import LossTerm

IGNORE = -100


def target_mask(labels: Tensor, document_ids: Tensor | None) -> Tensor:
    """Which positions predict: (B, N) labels to (B, N - 1) bool."""
    mask = labels[:, 1:] != IGNORE
    if document_ids is not None:
        mask = mask & (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] != 0)
    return mask


def text_count(
    labels: Tensor, document_ids: Tensor | None = None, loss_weights: Tensor | None = None
) -> Tensor:
    """The count `text_loss` will return: predicted labels, or the sum of their weights."""
    mask = target_mask(labels, document_ids)
    if loss_weights is None:
        return mask.sum().float()
    return loss_weights[:, 1:][mask].float().sum()


def text_loss(
    hidden: Tensor,
    labels: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    document_ids: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> LossTerm:
    """Next-token cross-entropy in nats, in fp32.

    Args:
        hidden: (B, N, D).
        labels: (B, N), -100 where nothing is learned.
        logits: the head, (P, D) to (P, V); called on the predicting positions only.
        document_ids: (B, N), or None for one document per row.
        loss_weights: (B, N) weight of each label, or None for 1.

    Returns:
        The (weighted) sum, the sum of weights, and the metric `accuracy`.
    """
    mask = target_mask(labels, document_ids)
    targets = labels[:, 1:][mask]
    scores = logits(hidden[:, :-1][mask]).float()
    # A row without targets still touches the head, so that every rank has the same gradients.
    losses = F.cross_entropy(scores, targets, reduction="none")
    weights = None if loss_weights is None else loss_weights[:, 1:][mask].float()
    total = losses.sum() if weights is None else (losses * weights).sum()
    with torch.no_grad():
        right = (
            (scores.argmax(-1) == targets).sum().float() if targets.numel() else total.new_zeros(())
        )
    count = text_count(labels, document_ids, loss_weights)
    number = mask.sum().float()
    return LossTerm(total, count, {"accuracy": (right, number)})
