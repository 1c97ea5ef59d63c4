"""The text loss: next-token cross-entropy as a sum and a count.

Position n is trained on the label at n + 1. A label counts where it is not -100 and where both
positions belong to the same document, so that a packed row trains on exactly the pairs that its
documents have apart.

The logits of all positions never exist at once (see `nn.linear_loss`): a plain linear head goes
through `linear_cross_entropy`, any other is called slice by slice.

With `legal` ranges, a target in one of them competes with the ids of its range alone, as if all
other logits were -inf; any other target competes with every id. Of a plain or split head only the
rows of the range are multiplied then.

Footgun: legal ranges teach nothing about where a range ends. Where the end marker stands is learned
at end markers alone, and not at the codes before them; use them where the grammar knows the length.

Shapes: B rows, N positions, P predicting positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xoron_core.components import LossTerm
from xoron_core.errors import SequenceError
from xoron_core.nn.linear_loss import (
    TokenLosses,
    chunked_cross_entropy,
    is_plain_linear,
    linear_cross_entropy,
)
from xoron_core.nn.split_rows import SplitLinear, is_sharded
from xoron_core.tokens.space import TokenSpace

IGNORE = -100

Ranges = Sequence[tuple[int, int]]


class _Head(NamedTuple):
    """What makes logits of (P, D), and its matrix and bias where it is a product with them."""

    logits: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None


def codec_ranges(space: TokenSpace) -> tuple[tuple[int, int], ...]:
    """The `legal` ranges of a token space: first id and id behind the last, per codebook."""
    live = (one for one in space.ranges if one.kind == "codec" and not one.removed)
    return tuple((one.start, one.stop) for one in live)


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
    legal: Ranges = (),
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
        legal: disjoint ranges of ids, first and behind the last, whose targets compete with each
            other alone; see `codec_ranges`.

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
        legal=legal,
    )
    return term._replace(count=text_count(labels, document_ids, loss_weights))


def label_count(labels: Tensor) -> Tensor:
    """The count that `label_loss` will return."""
    return (labels != IGNORE).sum().float()


def label_loss(
    rows: Tensor,
    labels: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    head: nn.Module | None = None,
) -> LossTerm:
    """Cross-entropy of the words that rows of media resemble, in nats, in fp32.

    Token labelling (Jiang et al. 2021) with the model's own head: a row as it enters the backbone,
    normalised like a hidden state, is to say its word. So an encoder learns from every position,
    and where head and embedding are tied, what it sees looks to the backbone like the word.

    Args:
        rows: (B, N, D), inputs of the backbone.
        labels: (B, N), aligned with the rows, -100 where nothing is learned.
        logits, head: as for `text_loss`.
    """
    mask = labels != IGNORE
    hidden = nn.functional.rms_norm(rows[mask], rows.shape[-1:])
    return token_loss(hidden, labels[mask], logits, head=head)


def token_loss(
    hidden: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    head: nn.Module | None = None,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    legal: Ranges = (),
) -> LossTerm:
    """`text_loss` of positions that already stand beside their targets.

    Args:
        hidden: (P, D). Without positions the head is still touched, so that every rank has the
            same gradients.
        targets: (P,) int64 in [0, V).
        logits, head, z_loss, legal: as for `text_loss`.
        weights: (P,) or None for 1.

    Raises:
        SequenceError: if legal ranges are empty or overlap.
    """
    parts = _parts(hidden, targets, logits, head, weights, z_loss, legal)
    number = hidden.new_tensor(targets.numel(), dtype=torch.float32)
    count = number if weights is None else weights.float().sum()
    correct = torch.stack([part.correct.sum() for part in parts]).sum().float()
    metrics = {"accuracy": (correct, number)}
    if z_loss:
        squares = [part.log_z.detach().square().sum() for part in parts]
        metrics["log_z_squared"] = (torch.stack(squares).sum(), number)
    return LossTerm(torch.stack([part.sum for part in parts]).sum(), count, metrics)


def _parts(
    hidden: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    head: nn.Module | None,
    weights: Tensor | None,
    z_loss: float,
    legal: Ranges,
) -> list[TokenLosses]:
    """The losses per legal range, and those of all other targets."""
    whole = _plain(logits, head)
    if not legal:
        return [_losses(hidden, targets, whole, weights, z_loss)]
    _check_ranges(legal)
    parts = []
    rest = torch.ones_like(targets, dtype=torch.bool)
    for start, stop in legal:
        # Every range is entered, also without targets: ranks must call a sharded head alike.
        chosen = (targets >= start) & (targets < stop)
        rest &= ~chosen
        own = None if weights is None else weights[chosen]
        cut = _cut(logits, head, start, stop)
        parts.append(_losses(hidden[chosen], targets[chosen] - start, cut, own, z_loss))
    own = None if weights is None else weights[rest]
    return [*parts, _losses(hidden[rest], targets[rest], whole, own, z_loss)]


def _check_ranges(legal: Ranges) -> None:
    ordered = sorted(legal)
    overlap = any(one[1] > two[0] for one, two in pairwise(ordered))
    if overlap or any(not 0 <= start < stop for start, stop in ordered):
        raise SequenceError(
            f"legal ranges must not be empty or overlap, got {ordered}; take"
            " losses.codec_ranges(model.space)"
        )


def _plain(logits: Callable[[Tensor], Tensor], head: nn.Module | None) -> _Head:
    if head is None or not is_plain_linear(head):
        return _Head(logits)
    linear = cast(nn.Linear, head)
    return _Head(logits, linear.weight, linear.bias)


def _cut(
    logits: Callable[[Tensor], Tensor], head: nn.Module | None, start: int, stop: int
) -> _Head:
    """The head with the rows of a range alone."""

    def some(hidden: Tensor) -> Tensor:
        return logits(hidden)[..., start:stop]

    whole = _plain(logits, head)
    weight, bias = whole.weight, whole.bias
    if isinstance(head, SplitLinear) and not is_sharded(head.rows):
        weight, bias = head.rows_between(start, stop), head.bias
    elif weight is not None:
        weight = weight[start:stop]
    return _Head(some, weight, None if bias is None else bias[start:stop])


def _losses(
    hidden: Tensor, targets: Tensor, head: _Head, weights: Tensor | None, z_loss: float
) -> TokenLosses:
    if head.weight is not None:
        return linear_cross_entropy(
            hidden,
            head.weight,
            targets=targets,
            bias=head.bias,
            weights=weights,
            z_loss=z_loss,
        )
    # A sharded head gathers on each call, and ranks that call it unequally often never meet again.
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return chunked_cross_entropy(
        hidden,
        head.logits,
        targets=targets,
        weights=weights,
        z_loss=z_loss,
        chunk=max(len(hidden), 1) if many else None,
    )
