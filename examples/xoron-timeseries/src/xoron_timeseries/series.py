"""Configs, and how a series comes in. No torch at import, so that plans and workers stay light."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from xoron_core.config import Config
from xoron_core.errors import DataError


class EncoderConfig(Config):
    """Attributes: patch_size P, values of a patch; feature_size E, width of a feature."""

    patch_size: int = Field(default=8, ge=1)
    feature_size: int = Field(default=128, ge=1)


class ProjectorConfig(Config):
    """Nothing to choose."""


class CodecConfig(Config):
    """Attributes: bins, number of codes; max_length, most values of a generated series."""

    bins: int = Field(default=256, ge=256)  # exponents of fp32 need as many
    max_length: int = Field(default=512, ge=1)


class LossConfig(Config):
    """Attributes: of, the slot whose reconstruction is judged."""

    of: str = "series.codec"


def load(source: Any) -> np.ndarray:
    """A CSV file (its path or bytes; the last column, a header allowed) or numbers to (T,) fp32.

    Raises:
        DataError: if it is not a series of finite numbers.
    """
    try:
        if isinstance(source, str | Path | bytes):
            lines = source.decode().splitlines() if isinstance(source, bytes) else source
            column = np.genfromtxt(lines, delimiter=",", ndmin=2)[:, -1]
            source = column[int(np.isnan(column[0])) :]
        values = np.asarray(source, dtype=np.float32).reshape(-1)
    except (OSError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"series: cannot be read ({error}); expected CSV or numbers") from None
    if not values.size or not np.isfinite(values).all():
        raise DataError(f"series: {values.size} values, some not finite; expected numbers")
    return values


def sample(seed: int, size: int) -> np.ndarray:
    """A random walk of 20 * size steps, for checks."""
    return load(np.random.default_rng(seed).normal(size=20 * size).cumsum())


class SeriesProcessor:
    """Arrays to rows padded with zeros; `step` values take one position, and `extra` one more."""

    def __init__(self, step: int = 1, extra: int = 0) -> None:
        self.step, self.extra = step, extra

    def load(self, media: np.ndarray) -> dict[str, Any]:
        """(T,) values, padded to a multiple of `step`, and `valid` (T,), which of them are real."""
        padded = np.pad(media, (0, -len(media) % self.step))
        return {"values": padded, "valid": np.arange(len(padded)) < len(media)}

    def collate(self, items: Any) -> dict[str, Any]:
        """Items to `values` (M, T) fp32 and `valid` (M, T) bool."""
        from torch import from_numpy
        from torch.nn.utils.rnn import pad_sequence

        rows = {key: [from_numpy(item[key]) for item in items] for key in ("values", "valid")}
        return {key: pad_sequence(found, batch_first=True) for key, found in rows.items()}

    def num_positions(self, item: Any) -> int:
        """Patches of an encoder, or codes of a codec."""
        return len(item["values"]) // self.step + self.extra
