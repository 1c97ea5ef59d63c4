"""How sure an answer is, and whether being sure means being right. Imports no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xoron_core.errors import DataError


def answer_confidence(logprobs: Sequence[float]) -> float | None:
    """Geometric mean probability of an answer's ids, from their log-probabilities in nats.

    Returns:
        a number in [0, 1], or None without any id.
    """
    return math.exp(math.fsum(logprobs) / len(logprobs)) if logprobs else None


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence.

    Attributes:
        low, high: the confidences it takes: (low, high], the first one with 0 too.
        count: number of answers.
        confidence: their mean confidence; 0 if there is none.
        accuracy: the share that is correct; 0 if there is none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """A calibration report.

    Attributes:
        count: number of answers.
        confidence: mean confidence.
        accuracy: share of correct answers.
        ece: expected calibration error in [0, 1]: the mean over answers of the distance between
            confidence and accuracy of their bin (Guo et al. 2017, "On Calibration of Modern
            Neural Networks").
        max_error: the largest such distance of a bin that holds any answer.
        brier: mean squared distance of confidence and correctness (Brier 1950).
        bins: from low to high, of equal width.
    """

    count: int
    confidence: float
    accuracy: float
    ece: float
    max_error: float
    brier: float
    bins: tuple[Bin, ...]

    def table(self) -> str:
        """Plain lines for a terminal: one per bin that holds answers, then the totals."""
        lines = ["confidence      answers  mean    correct"]
        lines += [
            f"({b.low:.2f}, {b.high:.2f}]  {b.count:>9,}  {b.confidence:.3f}  {b.accuracy:.3f}"
            for b in self.bins
            if b.count
        ]
        lines.append(f"expected calibration error {self.ece:.4f}, largest {self.max_error:.4f}")
        lines.append(f"accuracy {self.accuracy:.4f}, Brier score {self.brier:.4f}")
        return "\n".join(lines)


def calibration(pairs: Iterable[tuple[float, bool]], *, bins: int = 10) -> Calibration:
    """Compares confidences with correctness.

    Args:
        pairs: (confidence in [0, 1], whether the answer was correct).
        bins: number of bins of equal width.

    Raises:
        DataError: without pairs, without bins, or for a confidence outside [0, 1].
    """
    data = [(float(confidence), bool(correct)) for confidence, correct in pairs]
    if not data:
        raise DataError("no (confidence, correct) pairs were given; expected at least one")
    if bins < 1:
        raise DataError(f"bins {bins}: expected 1 or more")
    highs = [(i + 1) / bins for i in range(bins)]
    groups: list[list[tuple[float, bool]]] = [[] for _ in highs]
    for confidence, correct in data:
        if not 0 <= confidence <= 1:
            raise DataError(f"confidence {confidence}: expected a probability in [0, 1]")
        groups[bisect_left(highs, confidence)].append((confidence, correct))
    found = tuple(
        Bin(i / bins, highs[i], len(group), *_means(group)) for i, group in enumerate(groups)
    )
    errors = [(abs(b.confidence - b.accuracy), b.count) for b in found if b.count]
    mean, accuracy = _means(data)
    return Calibration(
        count=len(data),
        confidence=mean,
        accuracy=accuracy,
        ece=math.fsum(error * count for error, count in errors) / len(data),
        max_error=max(error for error, _ in errors),
        brier=math.fsum((c - right) ** 2 for c, right in data) / len(data),
        bins=found,
    )


def _means(group: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    if not group:
        return 0.0, 0.0
    confidence = math.fsum(c for c, _ in group) / len(group)
    return confidence, sum(right for _, right in group) / len(group)
