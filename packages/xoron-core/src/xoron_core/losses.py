"""The text loss: next-token cross-entropy as a sum and a count.

Position n is trained on the label at n + 1. A label counts where it is not -100 and where both
positions belong to the same document, so that a packed row trains on exactly the pairs that its
documents have apart.

The logits of all positions never exist at once (see `nn.linear_loss`): a plain linear head goes
through `linear_cross_entropy`, any other is called slice by slice.

Shapes: B rows, N positions, P predicting positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xoron_core.components import LossTerm
from xoron_core.nn.linear_loss import (
    TokenLosses,
    chunked_cross_entropy,
    is_plain_linear,
    linear_cross_entropy,
)

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
    head: nn.Module | None = None,
    document_ids: Tensor | None = None,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> LossTerm:
    """Next-token cross-entropy in nats, in fp32.

    Args:
        hidden: (B, N, D).
        labels: (B, N), -100 where nothing is learned.
        logits: the head, (P, D) to (P, V); called on the predicting positions only.
        head: the module that `logits` calls, if `logits` does nothing else; None where it does
            more (soft-capping, scaling) or where that is not known.
        document_ids: (B, N), or None for one document per row.
        loss_weights: (B, N) weight of each label, or None for 1.
        z_loss: coefficient of the squared log-denominator of the softmax, at least 0.

    Returns:
        The (weighted) sum, the sum of weights, and the metric `accuracy`.
    """
    mask = target_mask(labels, document_ids)
    term = token_loss(
        hidden[:, :-1][mask],
        labels[:, 1:][mask],
        logits,
        head=head,
        weights=None if loss_weights is None else loss_weights[:, 1:][mask].float(),
        z_loss=z_loss,
    )
    return term._replace(count=text_count(labels, document_ids, loss_weights))


def token_loss(
    hidden: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    head: nn.Module | None = None,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> LossTerm:
    """`text_loss` of positions that already stand beside their targets.

    Args:
        hidden: (P, D). Without positions the head is still touched, so that every rank has the
            same gradients.
        targets: (P,) int64 in [0, V).
        logits, head, z_loss: as for `text_loss`.
        weights: (P,) or None for 1.
    """
    losses = _losses(hidden, targets, logits, head, weights, z_loss)
    number = hidden.new_tensor(targets.numel(), dtype=torch.float32)
    count = number if weights is None else weights.float().sum()
    metrics = {"accuracy": (losses.correct.sum().float(), number)}
    if z_loss:
        metrics["log_z_squared"] = (losses.log_z.detach().square().sum(), number)
    return LossTerm(losses.sum, count, metrics)


def _losses(
    hidden: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    head: nn.Module | None,
    weights: Tensor | None,
    z_loss: float,
) -> TokenLosses:
    if head is not None and is_plain_linear(head):
        linear = cast(nn.Linear, head)
        return linear_cross_entropy(
            hidden,
            linear.weight,
            targets=targets,
            bias=linear.bias,
            weights=weights,
            z_loss=z_loss,
        )
    # A sharded head gathers on each call, and ranks that call it unequally often never meet again.
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return chunked_cross_entropy(
        hidden,
        logits,
        targets=targets,
        weights=weights,
        z_loss=z_loss,
        chunk=max(len(hidden), 1) if many else None,
    )
