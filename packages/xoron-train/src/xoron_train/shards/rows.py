"""The rows of a shard: one conversation each, as ids, with what is learned and what media stand in.

A shard is Parquet. Its schema carries, as JSON, the settings it was made with, which part of the
source it covers, and what of that part could not be used.

Footgun: `learned` has the length of `input_ids`; a label is the id at its own position, as in a
sequence plan, and the model shifts. -100 is written nowhere.

Shapes: n ids of a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from xoron_core.errors import FolderError
from xoron_core.storage import atomic_file

_SPAN = pa.struct(
    [
        ("slot", pa.string()),
        ("codec", pa.string()),
        ("start", pa.int32()),
        ("length", pa.int32()),
        ("made", pa.bool_()),
        ("medium", pa.string()),
        ("metadata", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("number", pa.int64()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("digests", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.bool_())),
        ("media_labels", pa.list_(pa.struct([("position", pa.int32()), ("id", pa.int32())]))),
        ("spans", pa.list_(_SPAN)),
    ]
)
_KEY = b"xoron"


class Row(NamedTuple):
    """One conversation.

    Attributes:
        name: what it is reported under.
        number: in its split of the source.
        split: `train`, `held-out`, or another of the source.
        task: the modalities that are shown and those that are made, such as `image->text`.
        digests: hexadecimal digests of its media, or of its text where it has none.
        input_ids: (n,) integers.
        learned: (n,) booleans, what an assistant says.
        media_labels: position and id of what a medium's positions are to resemble.
        spans: of each medium its slot, the codec in the token space, where its body starts and how
            long it is, whether an assistant makes it, its digest, and JSON that decoding takes.
    """

    name: str
    number: int
    split: str
    task: str
    digests: Sequence[str]
    input_ids: Any
    learned: Any
    media_labels: Sequence[dict[str, int]]
    spans: Sequence[dict[str, Any]]


class About(NamedTuple):
    """What a shard says of itself.

    Attributes:
        settings: plain data of `record.Settings`.
        chunk: part, first and last + 1 index of the source that it covers.
        unreadable: name to reason.
        left_out: how many conversations are on neither side.
    """

    settings: dict[str, Any]
    chunk: tuple[str, int, int]
    unreadable: dict[str, str]
    left_out: int


def write_rows(path: Path, rows: Sequence[Row], about: About) -> None:
    """Writes a shard, whole or not at all; the same rows give the same bytes.

    Raises:
        FolderError: if that fails.
    """
    columns = zip(*rows, strict=True) if rows else [[]] * len(Row._fields)
    arrays = [
        pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=True)
    ]
    write_table(path, with_about(pa.Table.from_arrays(arrays, schema=SCHEMA), about))


def with_about(table: pa.Table, about: About) -> pa.Table:
    """A table that says this of itself."""
    text = json.dumps(about._asdict(), sort_keys=True).encode()
    return table.replace_schema_metadata({_KEY: text})


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a shard's table, its schema's metadata included, whole or not at all.

    Raises:
        FolderError: if that fails.
    """
    with atomic_file(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_about(path: Path) -> About:
    """What a shard says of itself; its rows are not read.

    Raises:
        FolderError: if it is no shard, or damaged.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        about = json.loads(metadata[_KEY])
        return About(**{**about, "chunk": tuple(about["chunk"])})
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path}: is no shard, or damaged ({error}); remove it") from None


def read_table(path: Path) -> pa.Table:
    """The rows of a shard as a table of `SCHEMA`.

    Raises:
        FolderError: if it is no shard, or damaged.
    """
    try:
        # A memory map, not a data set of pyarrow's: the folder's name must not add columns.
        table = pq.ParquetFile(path, memory_map=True).read()
    except (OSError, pa.ArrowException) as error:
        raise FolderError(f"{path}: cannot be read ({error}); build or copy it again") from None
    if not table.schema.equals(SCHEMA):
        raise FolderError(
            f"{path}: has the columns {', '.join(table.column_names)}, expected those of a shard:"
            f" {', '.join(SCHEMA.names)}, each of its type; build or copy it again"
        )
    return table
