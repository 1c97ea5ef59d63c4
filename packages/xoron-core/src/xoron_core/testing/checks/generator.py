"""Generators: they end, follow their condition and their time step, and declare their counts."""

from __future__ import annotations

import torch

from xoron_core.testing.catalogue import check
from xoron_core.testing.checks.learning import perturb
from xoron_core.testing.drivers import GeneratorDriver
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import difference, named, noise, not_finite

GENERATOR = ("generator",)
ITEMS = ((1, 1), (2, 1), (3, 1))


@check(
    "generator-media",
    GENERATOR,
    since=1,
    summary="sample gives one medium per item",
)
def generator_media(subject: Subject) -> None:
    feed, part = GeneratorDriver(subject), subject.build()
    with torch.no_grad():
        media = feed.sample(part, feed.batch(ITEMS)["hidden"])
    values = named(media, "sample")
    where = f"{subject.component.factory}.sample"
    if not values or len(media) != len(ITEMS):
        raise CheckFailed(
            f"{where}: {len(ITEMS)} items give {type(media).__name__} of length {len(media)};"
            " expected tensors or arrays, one medium per item"
        )
    if off := not_finite(values):
        raise CheckFailed(f"{where}: {off}")


@check(
    "generator-condition",
    GENERATOR,
    since=1,
    summary="other hidden states give another sample and another loss",
    needs=("runs", "generator-media", "determinism"),
)
def generator_condition(subject: Subject) -> None:
    feed, part = GeneratorDriver(subject), subject.build()
    perturb(part)
    batch = feed.batch(ITEMS)
    other = {**batch, "hidden": noise(batch["hidden"].shape, 99)}
    with torch.no_grad():
        sample, another = (named(feed.sample(part, b["hidden"])) for b in (batch, other))
        losses = [float(feed.loss(part, b).sum) for b in (batch, other)]
    where = subject.component.factory
    if not difference(sample, another):
        raise CheckFailed(
            f"{where}.sample ignores its hidden states: other ones give the same media bit for bit"
        )
    if losses[0] == losses[1]:
        raise CheckFailed(f"{where}.loss ignores its hidden states: other ones give the same loss")


@check(
    "generator-time",
    GENERATOR,
    since=1,
    summary="where it has velocity(hidden, x, t), the time step changes the result",
    needs=("runs", "generator-media"),
)
def generator_time(subject: Subject) -> None:
    feed, part = GeneratorDriver(subject), subject.build()
    if not hasattr(part, "velocity"):
        raise CheckSkipped("it declares no method velocity(hidden, x, t)")
    perturb(part)
    batch = feed.batch(ITEMS)
    with torch.no_grad():
        target = part.encode_target(**batch["media"])
        early, late = (
            part.velocity(batch["hidden"], target, torch.full((len(ITEMS), 1, 1), t))
            for t in (0.1, 0.9)
        )
    if not difference({"velocity": early}, {"velocity": late}):
        raise CheckFailed(
            f"{subject.component.factory}.velocity ignores its time step: t = 0.1 and t = 0.9 give"
            " the same result"
        )


@check(
    "generator-count",
    GENERATOR,
    since=1,
    summary="target_count is the count that loss returns",
)
def generator_count(subject: Subject) -> None:
    feed, part = GeneratorDriver(subject), subject.build()
    for items in (ITEMS[:1], ITEMS):
        batch = feed.batch(items)
        declared = float(part.target_count(**batch["media"]))
        actual = float(feed.loss(part, batch).count)
        if declared != actual or actual <= 0:
            raise CheckFailed(
                f"{subject.component.factory}.target_count says {declared:g} for {len(items)}"
                f" items, loss counts {actual:g}; a trainer divides by it before any forward, so"
                " they must be equal and positive"
            )


@check(
    "generator-loss",
    GENERATOR,
    since=1,
    summary="the loss is a sum over items, not a mean",
    needs=("runs", "generator-count"),
)
def generator_loss(subject: Subject) -> None:
    feed, part = GeneratorDriver(subject), subject.build()
    one, eight = feed.batch(ITEMS[:1]), feed.batch(ITEMS[:1] * 8)
    with torch.no_grad():
        # Over many draws of noise and time, so that chance cannot look like a mean.
        single, many = (
            sum(float(feed.loss(part, batch, seed).sum) for seed in range(24))
            for batch in (one, eight)
        )
    if not 3 * single < many < 20 * single:
        raise CheckFailed(
            f"{subject.component.factory}.loss: the same item 8 times gives a sum of"
            f" {many / max(single, 1e-12):.2f} times that of one, expected about 8; return a sum"
            " and its count, and leave the division to the trainer"
        )
