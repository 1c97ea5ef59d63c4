"""Where conversations come from: local tables of chat messages, data sets of plug-ins.

A table is JSON lines or Parquet. Its media are paths relative to the folder of the file they stand
in, `data:` URLs, or bytes (Parquet); they are read when their conversation is laid out, not here.

Footguns:
- JSON lines are read line by line instead of as an Arrow table: the content of a message may be a
  string in one line and a list of parts in the next, which is no Arrow type.
- Parquet gives every message the union of all keys. Those that are null are dropped.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np

from xoron_core.descriptors import resolve
from xoron_core.errors import DataError
from xoron_train.catalog import find
from xoron_train.conversation import Conversation, Conversations
from xoron_train.data.config import SourceConfig
from xoron_train.data.sources import UnreadableError

_SUFFIXES = (".jsonl", ".parquet")
_MEDIUM_KEYS = ("path", "url", "data", "image_url")


def open_dataset(where: str, config: SourceConfig, split: str) -> Conversations:
    """One split of a data set that a plug-in brings.

    Args:
        where: the key it stands under, for errors.
        config: of kind `dataset`.
        split: one of its splits.

    Raises:
        UsageError: for a name that no plug-in offers.
        DataError: for an unknown or empty split.
    """
    dataset = find("data set", config.path, where=f"{where}.path")
    if split not in dataset.splits:
        raise DataError(
            f"{where}: the data set {config.path!r} has no split {split!r};"
            f" it has {', '.join(dataset.splits)}"
        )
    opened = cast(Conversations, resolve(dataset.factory)(split, **config.options))
    if not len(opened):
        raise DataError(f"{where}: the split {split!r} of {config.path!r} is empty")
    return opened


def dataset_splits(where: str, config: SourceConfig) -> tuple[str, ...]:
    """The splits of a data set, `train` first."""
    return cast("tuple[str, ...]", find("data set", config.path, where=f"{where}.path").splits)


class ConversationTable:
    """The conversations of the files that match a pattern, one file after another.

    Args:
        where: the key it stands under, for errors.
        pattern: a path or a glob of `.jsonl` and `.parquet` files.
        column: that holds the messages.

    Raises:
        DataError: if nothing matches, or a file cannot be opened or lacks the column.
    """

    def __init__(self, where: str, pattern: str, *, column: str = "messages") -> None:
        paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(f"{where}: no file matches {pattern}; correct its path")
        self.files = [_open(where, path, column) for path in paths]
        self.ends = list(accumulate(len(file) for file in self.files))
        self.column = column
        if not len(self):
            raise DataError(f"{where}: {pattern} holds no conversation")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        """Raises `UnreadableError` for a row that holds no messages."""
        number = bisect.bisect_right(self.ends, index)
        file = self.files[number]
        line = index - (self.ends[number] - len(file))
        name = f"{file.path.name}:{line + 1}"
        messages = _messages(name, file.read(line, name), self.column)
        return Conversation(name, [_placed(message, file.path.parent) for message in messages])

    def fingerprint(self) -> str:
        """A string that changes when files or their sizes do."""
        digest = hashlib.blake2b(digest_size=8)
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.path.stat().st_size}\0{len(file)}\0".encode())
        return digest.hexdigest()


class _JsonLines:
    """The lines of a file by number; only where each begins is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            sizes = [(len(line), bool(line.strip())) for line in file]
        ends = np.cumsum([size for size, _ in sizes], dtype=np.int64)
        held = np.array([filled for _, filled in sizes], bool)
        self.sizes = np.array([size for size, _ in sizes], np.int64)[held]
        self.starts = (ends[held] if len(ends) else ends) - self.sizes

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int, name: str) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.read(int(self.sizes[index]))
        try:
            return json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UnreadableError(name, f"is no JSON ({error})") from None


class _Parquet:
    """The rows of a file by number, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import datasets

        datasets.utils.logging.disable_progress_bar()
        self.path = path
        self.table = datasets.Dataset.from_parquet(str(path))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int, name: str) -> Any:
        return self.table[index]


def _open(where: str, path: Path, column: str) -> _JsonLines | _Parquet:
    from datasets.exceptions import DatasetsError

    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"{where}: {path} is neither {' nor '.join(_SUFFIXES)}; convert it, or narrow the path"
        )
    try:
        file = _JsonLines(path) if path.suffix == ".jsonl" else _Parquet(path)
        if len(file):
            first = file.read(0, path.name)
    except (OSError, ValueError, DatasetsError, UnreadableError) as error:
        raise DataError(f"{where}: {path} cannot be opened: {error}") from None
    if len(file) and (not isinstance(first, Mapping) or column not in first):
        found = ", ".join(first) if isinstance(first, Mapping) else type(first).__name__
        raise DataError(
            f"{where}: {path} has no column {column!r}; it has {found}. Set {where}.field to the"
            " one that holds the messages"
        )
    return file


def _messages(name: str, row: Any, column: str) -> list[Mapping[str, Any]]:
    value = row.get(column) if isinstance(row, Mapping) else None
    if isinstance(value, str):  # tables that cannot nest hold JSON
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UnreadableError(name, f"{column!r} is no JSON ({error})") from None
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise UnreadableError(
            name, f"{column!r} holds no messages; expected a list of {{role, content}}"
        )
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _placed(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A message without nulls, whose media can be read from any directory."""
    kept = {key: value for key, value in message.items() if value is not None}
    if isinstance(parts := kept.get("content"), list):
        kept["content"] = [_part(part, folder) for part in parts]
    return kept


def _part(part: Any, folder: Path) -> Any:
    if not isinstance(part, Mapping) or part.get("type") == "text":
        return part if not isinstance(part, Mapping) else _without_nulls(part)
    keys = {*_MEDIUM_KEYS, part.get("type")}
    return {
        key: _medium(value, folder) if key in keys else value
        for key, value in part.items()
        if value is not None
    }


def _medium(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value if value.startswith("data:") or "://" in value else str(folder / value)
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:  # how the `datasets` library writes a file
            return value["bytes"]
        url = value.get("url") or value.get("path")
        return value if url is None else _medium(url, folder)
    return value


def _without_nulls(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}
