"""Orders and splits that depend on nothing but their inputs.

They come from hashes instead of a library's random generator, whose stream may change with its
version: the same seed then means the same order on every machine, and an interrupted run resumes
into it.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1


def permutation(size: int, *key: int | str) -> np.ndarray:
    """Returns a permutation (size,) int64 of `range(size)`, decided by `key`.

    Every index gets a 64-bit value from SplitMix64 (Steele et al. 2014); sorting by it shuffles.
    """
    start = np.uint64(_digest(repr(key).encode()))
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = start + (np.arange(size, dtype=np.uint64) + np.uint64(1)) * gamma
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable").astype(np.int64)


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out share; decided by its content alone."""
    return _digest(text.encode("utf-8", "surrogatepass")) < fraction * (_MASK + 1)


def below(digest: bytes, fraction: float) -> bool:
    """Whether a digest of at least 8 bytes falls into the held-out share."""
    return int.from_bytes(digest[:8], "little") < fraction * (_MASK + 1)


def choice(size: int, *key: int | str) -> int:
    """Returns a number in `range(size)`, decided by `key`, nearly uniform."""
    return _digest(repr(key).encode()) % size


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") & _MASK
