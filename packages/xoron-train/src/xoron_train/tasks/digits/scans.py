"""Scanned digits: the 1,797 of scikit-learn (Alpaydin & Kaynak 1998), 8 by 8, split by position.

The scans of one person follow each other in the file, so its last fifth comes from other hands than
the rest: no scan of it is closer than 9.1 (Euclidean, of at most 16 per pixel) to any that is
trained on, while neighbours in the file come as close as 5.3. A nearest neighbour classifier reads
95.6 % of the last fifth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from xoron_core.errors import PluginError

_TRAINED = 1437


@dataclass(frozen=True)
class Scans:
    """Scans of one side of the split.

    Attributes:
        images: (n, 8, 8) fp32, ink from 0 to 1.
        by_digit: for each digit, the indices of its scans.
    """

    images: np.ndarray
    by_digit: tuple[np.ndarray, ...]


@cache
def scans(*, trained: bool) -> Scans:
    """The scans that are trained on, or the others.

    Raises:
        PluginError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise PluginError(
            "the data set vision-digits is made from scikit-learn's scanned digits; run:"
            " pip install 'xoron-train[digits]'"
        ) from None
    data = load_digits()
    side = slice(None, _TRAINED) if trained else slice(_TRAINED, None)
    images = (data.images[side] / 16).astype(np.float32)
    labels = data.target[side]
    return Scans(images, tuple(np.flatnonzero(labels == digit) for digit in range(10)))
