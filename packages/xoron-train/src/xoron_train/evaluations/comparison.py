"""Two losses of the same samples, compared: difference, its interval, wins. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from xoron_train.evaluations.base import Check
from xoron_train.evaluations.config import Gate

RESAMPLES = 2000
_Z = 1.959964  # of a normal distribution, 95 %, both sides


def compare(
    correct: np.ndarray, without: np.ndarray, *, group: np.ndarray, gate: Gate | None, seed: int
) -> dict[str, Any]:
    """One comparison of the record.

    Args:
        correct: (n,) losses with the correct media.
        without: (n,) losses of the same samples without them.
        group: (n,) equal where samples share media.
        gate: that it must pass, or None.
        seed: of the interval.
    """
    deltas = without - correct
    wins = float(((deltas > 0) + 0.5 * (deltas == 0)).mean())
    record: dict[str, Any] = {
        "samples": len(deltas),
        "loss": float(without.mean()),
        "delta": float(deltas.mean()),
        "interval": interval(deltas, group=group, seed=seed),
        "wins": wins,
    }
    if gate is not None:
        record["passed"] = record["delta"] >= gate.delta and wins >= gate.wins
    return record


def interval(values: np.ndarray, *, group: np.ndarray, seed: int) -> list[float]:
    """The 95 % percentile interval of a mean (Efron 1979), resampling whole groups.

    Args:
        values: (n,).
        group: (n,) equal where values depend on each other.
        seed: of the resampling.
    """
    _, member = np.unique(group, return_inverse=True)
    sums, sizes = np.bincount(member, weights=values), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def comparison_checks(name: str, found: Mapping[str, Any], gate: Gate) -> list[Check]:
    """A comparison's two figures beside its gate.

    Args:
        name: of what the correct thing was exchanged for.
        found: as `compare` returned it.
        gate: what must be reached.
    """
    number, wins = found["samples"], found["wins"]
    low, high = found["interval"]
    return [
        Check(
            f"{name} wins",
            wins,
            number,
            at_least=gate.wins,
            interval=share_interval(wins, number),
        ),
        Check(f"{name} delta", found["delta"], number, at_least=gate.delta, interval=(low, high)),
    ]


def share_interval(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); of 0 or 1 it is no point.

    Args:
        share: in [0, 1].
        number: of independent samples, 1 or more.
    """
    weight = _Z**2 / number
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / number + weight / (4 * number)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)
