"""Two losses of the same samples, compared: difference, its interval, wins. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from xoron_train.evaluations.config import Gate

RESAMPLES = 2000


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
