"""The same input gives the same output: under a seed, and whatever else draws random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from xoron_core.testing.catalogue import NEURAL, check
from xoron_core.testing.checks.state import snapshot
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import Named, difference

ITEMS = ((1, 1), (2, 1))


@check(
    "determinism",
    NEURAL,
    since=1,
    summary="the same seed gives bit-equal parameters and bit-equal outputs",
    needs=("runs", "state-names"),
)
def determinism(subject: Subject) -> None:
    factory = subject.component.factory
    part, again = subject.build(3), subject.build(3)
    if off := difference(snapshot(part), snapshot(again)):
        raise CheckFailed(
            f"{factory}.__init__: built twice under one seed, {off}; initialise from torch's"
            " generator alone"
        )
    feed = driver(subject)
    batch = feed.batch(ITEMS)
    if off := difference(_run(feed, part, batch, seed=0), _run(feed, part, batch, seed=0)):
        raise CheckFailed(
            f"{factory}: the same input under the same seed gives two results: {off}; draw from"
            " the generator that is handed over"
        )
    if off := difference(_train(feed, part, batch), _train(feed, part, batch)):
        raise CheckFailed(
            f"{factory}: training on the same input under the same seed gives two results: {off};"
            " draw from torch's global generator there, which a trainer seeds and saves"
        )


@check(
    "global-rng",
    NEURAL,
    since=1,
    summary="evaluation neither reads nor moves the global random generators",
    needs=("runs", "determinism"),
)
def global_rng(subject: Subject) -> None:
    factory, feed, part = subject.component.factory, driver(subject), subject.build()
    batch = feed.batch(ITEMS)
    first = _run(feed, part, batch, seed=0)
    state = _states()
    with torch.no_grad():
        feed.everything(part, batch)
    moved = [name for name, value in _states().items() if value != state[name]]
    off = difference(first, _run(feed, part, batch, seed=1))
    if off or moved:
        raise CheckFailed(
            f"{factory}: evaluation draws from the global generator"
            f" ({off or f'it moves that of {moved[0]}'}); use the torch.Generator that is handed"
            " over, or one of its own with a fixed seed"
        )


def _train(feed: Any, part: Any, batch: Any) -> Named:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"the training objective": feed.train(part, batch).detach()}


def _run(feed: Any, part: Any, batch: Any, *, seed: int) -> Named:
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            with torch.no_grad():
                result: Named = feed.everything(part, batch)
                return {name: value.clone() for name, value in result.items()}
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _states() -> dict[str, Any]:
    """The state of every global generator, comparable."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
    }
