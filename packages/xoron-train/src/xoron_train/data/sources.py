"""Where documents come from: files of a folder, local tables, data sets of the Hub.

Two shapes. An `IndexedSource` knows its length and reads any document by index, so it is shuffled
whole; a `StreamedSource` only reads on. Both name every document, so that one that cannot be read
is reported by name. `datasets` is imported only for the sources that need it.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from xoron_core.errors import DataError
from xoron_train.conversation import HELD_OUT, TRAIN
from xoron_train.data.config import SourceConfig
from xoron_train.data.order import held_out

EMPTY = "empty"
_THIRD_PARTY = ("site-packages", "dist-packages")


class Document(NamedTuple):
    """A text and the name it is reported under."""

    name: str
    text: str

    def side(self, eval_fraction: float) -> str:
        """`train`, `held-out` or `empty`."""
        if not self.text:
            return EMPTY
        return HELD_OUT if held_out(self.text, eval_fraction) else TRAIN


class Item(Protocol):
    """What a source gives: a document or a conversation."""

    @property
    def name(self) -> str:
        """What it is reported under."""

    def side(self, eval_fraction: float) -> str:
        """`train`, `held-out`, or why it is neither."""


T = TypeVar("T", bound=Item)


class UnreadableError(Exception):
    """One document cannot be read; carries its name and the reason. Never leaves this package."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # it may come from a worker process


class IndexedSource(ABC, Generic[T]):
    """Documents or conversations by index."""

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents, readable or not."""

    @abstractmethod
    def read(self, index: int) -> T:
        """Returns one of them, or raises `UnreadableError`."""

    def walk(self, indices: Iterable[int]) -> Iterator[T | UnreadableError]:
        """Yields those of the given indices, in that order, or why one cannot be read."""
        return map(self.attempt, indices)

    def attempt(self, index: int) -> T | UnreadableError:
        """One of them, or why it cannot be read."""
        try:
            return self.read(index)
        except UnreadableError as error:
            return error

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes when documents come, go or change size."""


class StreamedSource(ABC, Generic[T]):
    """Documents in one fixed order."""

    name: str
    block_size: int

    @abstractmethod
    def read_from(self, start: int) -> Iterator[T | UnreadableError]:
        """Yields the documents from number `start` on, or why one cannot be read."""


def open_source(
    name: str, config: SourceConfig
) -> IndexedSource[Document] | StreamedSource[Document]:
    """Opens a source of text documents.

    Raises:
        DataError: if it is missing or empty, saying where it was looked for.
    """
    if config.kind == "files":
        return FileSource(name, config)
    if config.streaming:
        return TableStream(name, config)
    return TableSource(name, config)


class FileSource(IndexedSource[Document]):
    """One document per file below a folder. Files are read as UTF-8, bytes for bytes."""

    def __init__(self, name: str, config: SourceConfig) -> None:
        self.name = name
        stdlib = config.path == "stdlib"
        self.root = Path(sysconfig.get_path("stdlib") if stdlib else config.path)
        if not self.root.is_dir():
            raise DataError(
                f"mixture.{name}: {self.root} is no folder; correct mixture.{name}.path"
            )
        excluded = {path for glob_ in config.exclude for path in self.root.glob(glob_)}
        self.files = sorted(
            path
            for path in self.root.glob(config.pattern)
            if path not in excluded
            and path.is_file()
            and not (stdlib and any(part in _THIRD_PARTY for part in path.parts))
        )
        if not self.files:
            raise DataError(
                f"mixture.{name}: no file below {self.root} matches {config.pattern!r};"
                f" correct mixture.{name}.path or mixture.{name}.pattern"
            )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Document:
        path = self.files[index]
        name = path.relative_to(self.root).as_posix()
        try:
            return Document(name, path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise UnreadableError(name, error.strerror or str(error)) from None
        except UnicodeDecodeError as error:
            raise UnreadableError(name, f"is not UTF-8 (byte {error.start})") from None

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for path in self.files:
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{size}\0".encode())
        return digest.hexdigest()


class TableSource(IndexedSource[Document]):
    """A column of a `datasets.Dataset`: memory-mapped, read by index."""

    def __init__(self, name: str, config: SourceConfig) -> None:
        self.name = name
        self.column = config.column
        self.table = _load(name, config, streaming=False)
        if not len(self.table):
            raise DataError(f"mixture.{name}: {config.path} holds no document")
        _require_column(name, self.column, self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Document:
        return _text(f"{self.name}[{index}]", self.table[index][self.column])

    def fingerprint(self) -> str:
        return f"{len(self.table)} rows"


class TableStream(StreamedSource[Document]):
    """A column of a `datasets.IterableDataset`: read on, nothing prepared first."""

    def __init__(self, name: str, config: SourceConfig) -> None:
        self.name = name
        self.block_size = config.block_size
        self.column = config.column
        self.table = _load(name, config, streaming=True)
        if self.table.column_names is not None:
            _require_column(name, self.column, self.table.column_names)

    def read_from(self, start: int) -> Iterator[Document | UnreadableError]:
        rows = self.table.skip(start) if start else self.table
        for index, row in enumerate(rows, start):
            try:
                yield _text(f"{self.name}[{index}]", row.get(self.column))
            except UnreadableError as error:
                yield error


def _load(name: str, config: SourceConfig, *, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    try:
        if config.kind == "hf":
            return datasets.load_dataset(
                config.path, config.subset, split=config.split, streaming=streaming
            )
        options: dict[str, Any] = {"sample_by": config.sample_by} if config.kind == "text" else {}
        if config.kind == "text":
            options["keep_linebreaks"] = True
        builder = "json" if config.kind == "jsonl" else config.kind
        files = _matches(name, config.path)
        return datasets.load_dataset(
            builder, data_files=files, split="train", streaming=streaming, **options
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"mixture.{name}: {config.path} cannot be opened as {config.kind!r}:"
            f" {type(error).__name__}: {error}"
        ) from error


def _matches(name: str, pattern: str) -> list[str]:
    files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not files:
        raise DataError(f"mixture.{name}: no file matches {pattern}; correct mixture.{name}.path")
    if all(Path(path).stat().st_size == 0 for path in files):
        raise DataError(f"mixture.{name}: every file that matches {pattern} is empty")
    return files


def _require_column(name: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise DataError(
            f"mixture.{name}: has no column {column!r}; it has {', '.join(columns)}."
            f" Set mixture.{name}.field to one of them."
        )


def _text(name: str, value: Any) -> Document:
    if not isinstance(value, str):
        raise UnreadableError(name, f"expected text, got {type(value).__name__}")
    return Document(name, value)
