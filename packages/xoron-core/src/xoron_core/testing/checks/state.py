"""Forward changes nothing that is kept, and what is frozen stays as it is, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from xoron_core.components import Part
from xoron_core.testing.catalogue import NEURAL, check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import difference

ITEMS = ((1, 1), (2, 1))


@check(
    "forward-keeps-state",
    NEURAL,
    since=1,
    summary="a forward pass changes no parameter and no buffer, in training mode either",
    needs=("runs", "state-names"),
)
def forward_keeps_state(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    batch = feed.batch(ITEMS)
    before = snapshot(part)
    torch.manual_seed(0)
    feed.train(part, batch).detach()
    with torch.no_grad():
        feed.everything(part.eval(), batch)
    if off := difference(before, snapshot(part)):
        raise CheckFailed(
            f"{subject.component.factory}: after a forward pass, {off}. Under activation"
            " recomputation, accumulation and dummy batches it would be counted wrongly: return"
            " statistics and change it in after_optimizer_step"
        )


@check(
    "frozen",
    NEURAL,
    since=1,
    summary="frozen, it gets no gradient and no optimizer moves it",
    needs=("runs", "forward-keeps-state"),
)
def frozen(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    batch = feed.batch(ITEMS)
    part.requires_grad_(False)
    before = snapshot(part)
    torch.manual_seed(0)
    objective = feed.train(part, batch)
    if objective.requires_grad:
        objective.backward()
    thawed = [name for name, p in part.named_parameters() if p.requires_grad or p.grad is not None]
    if thawed:
        raise CheckFailed(
            f"{subject.component.factory}: frozen with requires_grad_(False), a forward pass makes"
            f" {', '.join(thawed[:3])} trainable again; leave requires_grad to whoever trains"
        )
    if off := difference(before, snapshot(part)):
        raise CheckFailed(
            f"{subject.component.factory}: frozen, a training step still moves it: {off}"
        )


def snapshot(part: Part) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    state = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in state.items()}
