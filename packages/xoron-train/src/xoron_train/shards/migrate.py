"""Shards under another token space: every id goes with the name of what it means.

As `xoron_core.migrate` moves the rows of a model, and to the same places, so that a migrated model
and its migrated shards fit.

Footguns:
- Text bases are not translated into each other; the two spaces must have the same one.
- Nothing is tokenised anew, so codecs must be the same too, weights included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from xoron_core.errors import DataError, TokenSpaceError, UsageError
from xoron_core.migrate import row_sources
from xoron_core.storage import atomic_folder
from xoron_core.tokens.space import FILE_NAME, TokenSpace
from xoron_train.shards.checks import in_range, live_ids
from xoron_train.shards.origin import origin
from xoron_train.shards.record import ShardRecord, file_hash, read_record, write_record
from xoron_train.shards.rows import SCHEMA, read_about, read_table, with_about, write_table


def migrate_shards(folder: str | Path, model: str | Path, output: str | Path) -> None:
    """Writes shards whose ids are those of another model's token space.

    Args:
        folder: the shards; not changed.
        model: a model folder under the space to move to, with the same codecs.
        output: folder of the moved shards, written whole or not at all.

    Raises:
        UsageError: if `output` exists.
        TokenSpaceError: if a name means something else there, or ids that are used are gone.
        DataError: if the model's codecs are others.
        FolderError: if a folder is incomplete or damaged.
    """
    folder, output = Path(folder), Path(output)
    if output.exists():
        raise UsageError(f"{output}: exists; choose a new folder")
    record = read_record(folder)
    old = TokenSpace.load(folder / FILE_NAME)
    old.require_same(record.settings.token_space_hash, where=str(folder))
    found = origin(model)
    for slot, codec in record.settings.codecs.items():
        other = found.codecs.get(slot)
        if other != codec:
            has = "missing" if other is None else f"another ({other.use}, {other.weights})"
            raise DataError(
                f"{model}: the codec in {slot!r} is {has}; ids of {folder} were made with"
                f" {codec.use}, {codec.weights}. Migrate to a model with the same codecs, or build"
                " anew"
            )
    settings = record.settings.model_copy(
        update={
            "token_space_hash": found.space.hash,
            "tokenizer_hash": found.tokenizer_hash,
            "codecs": found.codecs,
            "markers": found.markers,
        }
    )
    places = _places(old, found.space)
    moved = []
    with atomic_folder(output) as aside:
        found.space.save(aside / FILE_NAME)
        for shard in record.shards:
            table = _moved(read_table(folder / shard.file), places, old, where=shard.file)
            about = read_about(folder / shard.file)._replace(settings=settings.data())
            write_table(aside / shard.file, with_about(table, about))
            sha = file_hash(aside / shard.file)
            moved.append(ShardRecord(file=shard.file, sha256=sha, rows=shard.rows))
        write_record(
            aside, record.model_copy(update={"settings": settings, "shards": tuple(moved)})
        )


def _places(old: TokenSpace, new: TokenSpace) -> np.ndarray:
    """(R,) int32: where each id of the old space stands in the new one, -1 where nowhere."""
    sources = row_sources(old, new).numpy()
    places = np.full(old.size, -1, np.int32)
    kept = sources >= 0
    places[sources[kept]] = np.flatnonzero(kept)
    return places


def _moved(table: pa.Table, places: np.ndarray, old: TokenSpace, *, where: str) -> pa.Table:
    ids = table["input_ids"].combine_chunks()
    labels = table["media_labels"].combine_chunks()
    values = labels.flatten()
    entries = pa.StructArray.from_arrays(
        [values.field("position"), _mapped(values.field("id"), places, old, where=where)],
        fields=list(values.type),
    )
    for name, column in (
        ("input_ids", _relist(ids, _mapped(ids.flatten(), places, old, where=where))),
        ("media_labels", _relist(labels, entries)),
    ):
        at = SCHEMA.get_field_index(name)
        table = table.set_column(at, SCHEMA.field(at), column)
    return table


def _relist(lists: pa.ListArray, values: pa.Array) -> pa.ListArray:
    """The same lists with other values."""
    lengths = lists.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=lists.type)


def _mapped(ids: pa.Array, places: np.ndarray, old: TokenSpace, *, where: str) -> pa.Array:
    """Ids of the old space as ids of the new one.

    Raises:
        TokenSpaceError: naming what the new space lacks.
    """
    numbers = ids.to_numpy(zero_copy_only=False)
    live = in_range(numbers, live_ids(old))
    if not live.all():
        raise TokenSpaceError(
            f"{where}: holds the id {numbers[~live][0]}, which means nothing; run: xoron tokens"
            " audit"
        )
    found = places[numbers]
    if (found < 0).any():
        lost = np.unique(numbers[found < 0])
        raise TokenSpaceError(
            f"{where}: the target token space lacks {_named(lost, old)}, which its rows use;"
            " migrate to a space that has them, e.g. one composed with --extend"
        )
    return pa.array(found, pa.int32())


def _named(ids: np.ndarray, space: TokenSpace, most: int = 5) -> str:
    """What ids mean: special tokens by their names, codes by their range."""
    specials = {special.id: special.key for special in space}
    names = [
        specials.get(number)
        or next(found.name for found in space.ranges if found.start <= number < found.stop)
        for number in ids.tolist()
    ]
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - most} more" if len(unique) > most else ""
    return f"{', '.join(unique[:most])}{more}"
