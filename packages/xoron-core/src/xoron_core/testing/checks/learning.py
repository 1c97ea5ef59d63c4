"""Gradients: they reach every trainable parameter, and the dummy batch reaches the same ones."""

from __future__ import annotations

import torch

from xoron_core.components import Part
from xoron_core.testing.catalogue import MEDIA, NEURAL, check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import difference, noise, not_finite

BATCH_SIZE = 6
# An expert that no position of one batch chooses may be chosen in the next.
BATCHES = 4


@check(
    "gradients",
    NEURAL,
    since=1,
    summary="the gradient reaches every trainable parameter",
    needs=("runs", "forward-keeps-state"),
)
def gradients(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    perturb(part)
    trainable = {n: p for n, p in part.named_parameters() if p.requires_grad}
    if not trainable:
        raise CheckSkipped("it has no trainable parameter")
    unreached = list(trainable)
    for batch in range(BATCHES):
        torch.manual_seed(batch)
        items = [(BATCH_SIZE * batch + seed, 2) for seed in range(1, BATCH_SIZE + 1)]
        objective = feed.train(part, feed.batch(items))
        if objective.requires_grad:
            objective.backward()
        unreached = [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
        if not unreached:
            break
    if unreached:
        more = f" and {len(unreached) - 4} more" if len(unreached) > 4 else ""
        raise CheckFailed(
            f"{subject.component.factory}: no gradient reaches {', '.join(unreached[:4])}{more};"
            " use the parameter in forward (a detach or no_grad hides it), or remove it"
        )
    if off := not_finite({n: p.grad for n, p in trainable.items() if p.grad is not None}):
        raise CheckFailed(f"{subject.component.factory}: the gradient of {off}")


@check(
    "dummy-batch",
    MEDIA,
    since=1,
    summary="the dummy batch is valid, always the same, and touches every trainable parameter",
    needs=("runs", "gradients"),
)
def dummy_batch(subject: Subject) -> None:
    where = f"{subject.component.factory}.dummy_batch"
    feed, part = driver(subject), subject.build()
    try:
        torch.manual_seed(0)
        batch = part.dummy_batch()
        torch.manual_seed(1)
        if off := difference(batch, subject.build(1).dummy_batch()):
            raise CheckFailed(f"{where} is another one on its next call: {off}; use no randomness")
    except NotImplementedError as error:
        raise CheckFailed(
            f"{where}: {error}; ranks that lack this modality run it, so that all ranks call the"
            " same parts"
        ) from error
    if subject.kind == "generator":
        K = part.num_queries(subject.config)
        M = len(next(iter(batch.values())))
        batch = {"media": batch, "hidden": noise((M, K, part.queries().shape[-1]), 1)}
    with torch.no_grad():
        if off := not_finite(feed.everything(part, batch)):
            raise CheckFailed(f"{where}: run on it, {off}")
    objective = feed.train(part, batch)
    if objective.requires_grad:
        (0.0 * objective).backward()
    missing = [n for n, p in part.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise CheckFailed(
            f"{where} does not use {', '.join(missing[:4])}; with it these have no gradient on one"
            " rank and one on another, and distributed training hangs"
        )


def perturb(part: Part, size: float = 0.05) -> None:
    """Adds noise to every trainable parameter: what starts at exactly zero hides gradients."""
    with torch.no_grad():
        for index, parameter in enumerate(part.parameters()):
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(size * noise(parameter.shape, index).to(parameter.dtype))
