"""A model with a codec of two delayed codebooks, and a table of conversations in all directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xoron_train.data.config import SourceConfig
from xoron_train.shards.build import build

CODEC = {"codec": {"use": "standin-grid", "delay": 1}}


class Talks:
    """Makes conversations about grids; a fixture, because test modules cannot import each other."""

    codec = CODEC

    @staticmethod
    def shows(grid: str, answer: str) -> list[dict[str, Any]]:
        """A question about a grid."""
        parts = [{"type": "grid", "grid": grid}, {"type": "text", "text": "first?"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    @staticmethod
    def makes(word: str, grid: str) -> list[dict[str, Any]]:
        """A grid that the assistant makes."""
        said = [{"type": "text", "text": "here "}, {"type": "grid", "grid": grid}]
        return [{"role": "user", "content": word}, {"role": "assistant", "content": said}]

    def of_every_kind(self, n: int) -> list[dict[str, Any]]:
        """Number n: a grid shown, made, made and shown again, or text alone."""
        grid, kind = f"{n}.npy", n % 4
        if kind == 0:
            return self.shows(grid, f"{n}")
        if kind == 1:
            return self.makes(f"draw {n}", grid)
        if kind == 2:
            again = self.makes("again", f"{n - 1}.npy")
            return [*self.shows(grid, "so"), *again, *self.shows(grid, "yes")]
        return [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]

    def write(self, folder: Path, count: int, *, broken: int = 0) -> Path:
        """A table of `count` conversations, and `broken` that show a grid that is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(count):
            rng = np.random.default_rng(n)
            rows = rng.standard_normal((int(rng.integers(1, 6)), 4)).astype(np.float32)
            np.save(folder / f"{n}.npy", rows)
        lost = [self.shows(f"lost-{n}.npy", "?") for n in range(broken)]
        return self.lines(folder / "talks.jsonl", [*map(self.of_every_kind, range(count)), *lost])

    @staticmethod
    def lines(path: Path, talks: Sequence[Any]) -> Path:
        """A JSON-lines table of these conversations."""
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        return path

    @staticmethod
    def table(path: Path) -> SourceConfig:
        """A table as a source."""
        return SourceConfig(kind="conversations", path=str(path))

    def build(self, lines: Path, folder: Path, model: Path, **keys: Any) -> Path:
        """Builds with the settings of the fixture `shards`, or others."""
        keys = {"eval_fraction": 0.3, "shard_size": 12, "batch_size": 5, **keys}
        build(self.table(lines), folder, model=model, **keys)
        return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps of the tables that it opens goes with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def talks() -> Talks:
    return Talks()


@pytest.fixture(scope="module")
def model(new_model: Callable[..., Path]) -> Path:
    """The model folder."""
    return new_model(grid=CODEC)


@pytest.fixture(scope="module")
def lines(talks: Talks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations."""
    return talks.write(tmp_path_factory.mktemp("talks"), 40)


@pytest.fixture(scope="module")
def shards(
    talks: Talks, model: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as shards, twelve conversations each; not to be changed."""
    return talks.build(lines, tmp_path_factory.mktemp("shards") / "s", model)
