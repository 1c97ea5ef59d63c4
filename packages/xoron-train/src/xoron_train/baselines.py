"""Byte models that a trained model must beat: unigram, and order 2 with back-off.

Both are fitted by counting and score bits per byte on held-out text. Order 2 predicts a byte from
the two before it and backs off to order 1, unigram and uniform by Witten-Bell smoothing (Witten &
Bell 1991):

    p_n(c | h) = (count(h c) + types(h) * p_{n-1}(c | shorter h)) / (count(h) + types(h))

where types(h) is the number of different bytes seen after h. A document starts after two NUL bytes.

Footgun: the counts of order 2 take 128 MB, whatever the text's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

_CHUNK = 1 << 23  # bytes counted at a time


class ByteModel:
    """Counts of every byte after each context.

    Args:
        order: bytes of context, 0 (unigram) to 2.

    Raises:
        ValueError: for another order.
    """

    def __init__(self, order: int) -> None:
        if order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {order}")
        self.order = order
        self._counts = np.zeros(256 ** (order + 1), np.int64)

    def fit(self, documents: Iterable[bytes]) -> ByteModel:
        """Adds documents' counts and returns the model."""
        for index in self._chunks(documents):
            self._counts += np.bincount(index, minlength=self._counts.size)
        return self

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Returns the bits per byte over all documents.

        Raises:
            ValueError: if they hold no byte.
        """
        tables = [self._table(length) for length in range(self.order + 1)]
        nats, size = 0.0, 0
        for index in self._chunks(documents):
            nats -= float(np.log(_probabilities(index, tables)).sum())
            size += len(index)
        if not size:
            raise ValueError("there are no bytes to score")
        return nats / (size * math.log(2))

    def _table(self, length: int) -> np.ndarray:
        """Counts (contexts, 256) with the last `length` bytes of context."""
        return self._counts.reshape(-1, 256 ** (length + 1)).sum(0).reshape(-1, 256)

    def _chunks(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Every byte with its context, as an index into the counts."""
        parts: list[np.ndarray] = []
        size = 0
        for document in documents:
            data = np.frombuffer(b"\0" * self.order + document, np.uint8).astype(np.int64)
            index = data[self.order :].copy()
            for back in range(1, self.order + 1):
                index += data[self.order - back : len(data) - back] * 256**back
            parts.append(index)
            size += len(index)
            if size >= _CHUNK:
                yield np.concatenate(parts)
                parts, size = [], 0
        if size:
            yield np.concatenate(parts)


def _probabilities(index: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    """Witten-Bell probability of each indexed byte; `tables` by context length."""
    probability = np.full(len(index), 1 / 256)
    for counts in tables:
        context, byte = (index // 256) % len(counts), index % 256
        total = counts.sum(1)[context]
        types = (counts > 0).sum(1)[context]
        mixed = (counts[context, byte] + types * probability) / np.maximum(total + types, 1)
        probability = np.where(total > 0, mixed, probability)
    return probability
