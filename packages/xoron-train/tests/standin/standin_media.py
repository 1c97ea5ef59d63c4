"""A modality of small arrays, `grid`: its encoder, a projector with nested budgets, a data set and
an evaluation.

Shapes: M grids, L rows of the longest, each of 4 numbers, E = 8, K positions, D backbone width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xoron_core.components import Codec, Codes, Encoder, Features, Projector
from xoron_core.config import Config
from xoron_core.errors import ConfigError, DataError, UsageError
from xoron_core.tokens.space import CodecRange
from xoron_train.conversation import Conversation
from xoron_train.evaluations.base import Evaluation, EvaluationConfig


class GridConfig(Config):
    """Nothing to choose."""


class GridProjectorConfig(Config):
    """How many positions a grid takes, and fewer that will do."""

    num_tokens: int = 4
    budgets: tuple[int, ...] = (1, 2, 4)


def load_grid(source: Any) -> np.ndarray:
    """A path or the bytes of an `.npy` file, or rows of 4 numbers."""
    try:
        if isinstance(source, bytes):
            source = np.load(io.BytesIO(source))
        if isinstance(source, str | Path):
            source = np.load(source)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{source!r}: is no grid ({error})") from None
    return np.asarray(source, np.float32).reshape(-1, 4)


class GridProcessor:
    """Grids as they are."""

    def load(self, media: np.ndarray) -> dict[str, Any]:
        return {"rows": media}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        counts = torch.tensor([len(item["rows"]) for item in items])
        rows = torch.zeros(len(items), int(counts.max()), 4)
        for row, item in zip(rows, items, strict=True):
            row[: len(item["rows"])] = torch.from_numpy(item["rows"])
        return {"rows": rows, "mask": torch.arange(rows.shape[1]) < counts[:, None]}

    def num_positions(self, item: Mapping[str, Any]) -> int:
        return len(item["rows"])


class GridEncoder(Encoder):
    """One layer on each row."""

    feature_size = 8

    def __init__(self, config: GridConfig, context: Any) -> None:
        super().__init__(config, context)
        self.layer = nn.Linear(4, 8)

    @classmethod
    def processor(cls, config: GridConfig) -> GridProcessor:
        return GridProcessor()

    def dummy_batch(self) -> dict[str, Tensor]:
        return {"rows": torch.zeros(1, 2, 4), "mask": torch.ones(1, 2, dtype=torch.bool)}

    def forward(self, rows: Tensor, mask: Tensor) -> Features:
        return Features(self.layer(rows).tanh() * mask[..., None], mask)


class GridProjector(Projector):
    """The mean of the features, seen through as many layers as positions."""

    budgeted = True

    def __init__(self, config: GridProjectorConfig, context: Any) -> None:
        super().__init__(config, context)
        self.layers = nn.Linear(8, config.num_tokens * context.hidden_size)

    @classmethod
    def num_positions(cls, config: GridProjectorConfig, num_features: int) -> int:
        return config.num_tokens

    def forward(self, features: Features, counts: Tensor | None = None) -> Features:
        mean = features.values.sum(1) / features.mask.sum(1, keepdim=True)
        values = self.layers(mean).unflatten(-1, (self.config.num_tokens, -1))
        place = torch.arange(values.shape[1], device=values.device)
        most = values.new_tensor(values.shape[1]) if counts is None else counts[:, None]
        return Features(values, (place < most).expand(len(values), -1))


class GridCodecConfig(Config):
    """How many codes each of the two codebooks has, and by how much the second lags behind."""

    levels: int = 16
    delay: int = 0


class GridCodec(Codec):
    """Each row of a grid to two rounded numbers; how wide they spread is kept beside them."""

    def __init__(self, config: GridCodecConfig, context: Any) -> None:
        super().__init__(config, context)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    @classmethod
    def processor(cls, config: GridCodecConfig) -> GridProcessor:
        return GridProcessor()

    @classmethod
    def ranges(cls, config: GridCodecConfig) -> list[CodecRange]:
        name, levels, delay = "xoron-standin/grid-codec", config.levels, config.delay
        return [CodecRange(name, q, levels, "grid", None, "grid", q * delay) for q in range(2)]

    def dummy_batch(self) -> dict[str, Tensor]:
        return {"rows": torch.zeros(1, 2, 4), "mask": torch.ones(1, 2, dtype=torch.bool)}

    def encode(self, rows: Tensor, mask: Tensor) -> Codes:  # type: ignore[override]
        ids = (self.down(rows).sigmoid() * (self.config.levels - 1)).round().long()
        spread = (rows * mask[..., None]).abs().amax((1, 2))
        return Codes(ids, mask, [{"spread": float(s)} for s in spread])

    def decode(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        spread = torch.tensor([entry.get("spread", 1.0) for entry in metadata])
        return self.up(ids / (self.config.levels - 1)) * spread[:, None, None]


class Grids:
    """Grids whose first number is the answer; the same for the same split and index."""

    def __init__(self, split: str, size: int) -> None:
        self.seed = {"train": 0, "held-out": 1, "unseen": 2}[split]
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        rng = np.random.default_rng([self.seed, index])
        grid = rng.standard_normal((int(rng.integers(1, 5)), 4)).astype(np.float32)
        return Conversation(f"{self.split}-{index}", talk(grid, f"{grid[0, 0]:.1f}"), kind="first")


def talk(grid: Any, answer: str) -> list[dict[str, Any]]:
    """One question about a grid."""
    question = [{"type": "grid", "grid": grid}, {"type": "text", "text": "first?"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def grids(split: str, *, size: int = 40) -> Grids:
    """The data set `standin-grids`."""
    if size < 1:
        raise ConfigError(f"size: {size}; expected at least 1")
    return Grids(split, size)


class NoisyConfig(EvaluationConfig):
    """What its result says."""

    passes: bool | None = True
    result: float = 0.25


class Noisy(Evaluation):
    """Draws from every random generator, and says what it found."""

    def run(self, model: Any, processor: Any, samples: Sequence[Conversation]) -> dict[str, Any]:
        torch.rand(7)
        np.random.rand(7)
        result = {
            "result": self.config.result,
            "samples": len(samples),
            "first": samples[0].name,
            "training": model.training,
            "gradients": torch.is_grad_enabled(),
        }
        return result if self.config.passes is None else {**result, "passed": self.config.passes}


class Broken(list[Any]):
    """Conversations of which none can be made."""

    def __getitem__(self, index: Any) -> Any:
        raise UsageError(f"no {index}")
