"""Writes tokenised conversations: `xoron tokens build`.

Each shard is a function of the settings and of its chunk of the source, so shards may be made in
any order, by any number of processes, and after an interruption: the bytes are the same. A shard
appears whole or not at all; one that stands and was made with the same settings is kept.

Footgun: with `workers` above 1, processes are spawned, so a script that calls `build` needs the
usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from xoron_core.errors import DataError, UsageError
from xoron_core.tokens.space import FILE_NAME, TokenSpace
from xoron_train.data.config import SourceConfig
from xoron_train.shards.inputs import Chunk, Inputs
from xoron_train.shards.origin import Origin, origin
from xoron_train.shards.record import (
    FORMAT,
    RECORD,
    Settings,
    ShardRecord,
    ShardsRecord,
    changed,
    file_hash,
    holds_shards,
    read_record,
    shard_name,
    write_record,
)
from xoron_train.shards.rows import About, Row, read_about, read_table, write_rows
from xoron_train.shards.tokenize import Rules, Tokenization

logger = logging.getLogger("xoron.train")


class _Job(NamedTuple):
    """What a process needs to make shards."""

    model: str
    source: SourceConfig
    settings: Settings
    output: Path
    device: str


def build(
    source: SourceConfig,
    output: str | Path,
    *,
    model: str | Path,
    splits: Sequence[str] = (),
    limit: int | None = None,
    eval_fraction: float = 0.02,
    max_length: int | None = None,
    max_unreadable: float = 0.01,
    shard_size: int = 1024,
    batch_size: int = 16,
    workers: int = 1,
    device: str = "cpu",
) -> ShardsRecord:
    """Tokenises the conversations of a source into a folder, or goes on with one.

    Args:
        source: of kind `conversations` or `dataset`.
        output: the folder.
        model: the model folder whose tokenizer and codecs are used.
        splits: of a data set; none for all of them.
        limit: at most so many conversations of each split.
        eval_fraction: share of the media of local tables that is held out.
        max_length: longer conversations count as unreadable; None for any number of positions.
        max_unreadable: share of conversations that may be unreadable.
        shard_size: conversations of the source for each shard.
        batch_size: conversations whose media are encoded together.
        workers: processes, each with the model's codecs; the bytes do not depend on it.
        device: that codecs run on.

    Raises:
        UsageError: if `output` holds something else, or shards made with other settings.
        DataError: if too many conversations are unreadable.
        ConfigError, FolderError, TokenSpaceError: for a model that does not fit or is damaged.
    """
    inputs = Inputs(source, splits=splits, limit=limit)
    found = origin(model)
    settings = _settings(
        source,
        inputs,
        found,
        eval_fraction=eval_fraction,
        max_length=max_length,
        sizes=(shard_size, batch_size),
    )
    job = _Job(str(Path(model).absolute()), source, settings, Path(output).absolute(), device)
    tally = _Tally(inputs.total, max_unreadable)
    return _complete(job, found.space, inputs.chunks(shard_size), tally=tally, workers=workers)


def _settings(
    source: SourceConfig,
    inputs: Inputs,
    found: Origin,
    *,
    eval_fraction: float,
    max_length: int | None,
    sizes: tuple[int, int],
) -> Settings:
    table = source.kind == "conversations"
    return Settings(
        format=FORMAT,
        token_space_hash=found.space.hash,
        tokenizer_hash=found.tokenizer_hash,
        codecs=found.codecs,
        markers=found.markers,
        kind=source.kind,
        column=source.column if table else "",
        options=source.options,
        parts=tuple(inputs.sizes.items()),
        fingerprint=inputs.fingerprint,
        eval_fraction=eval_fraction if table else None,
        max_length=max_length,
        shard_size=sizes[0],
        batch_size=sizes[1],
    )


def _complete(
    job: _Job, space: TokenSpace, wanted: Sequence[Chunk], *, tally: _Tally, workers: int
) -> ShardsRecord:
    """Makes what does not stand yet, and the record."""
    output = job.output
    standing = _standing(output, job.settings, wanted)
    if holds_shards(output) and len(standing) == len(wanted):
        logger.info("%s: is complete", output)
        return read_record(output)
    output.mkdir(parents=True, exist_ok=True)
    space.save(output / FILE_NAME)
    for number in sorted(standing):
        tally.note(read_about(output / shard_name(number)))
    missing = [chunk for chunk in wanted if chunk.number not in standing]
    for chunk in _run(job, missing, workers=workers):
        tally.note(read_about(output / shard_name(chunk.number)))
        logger.info("%s: %d of %d conversations", output, tally.seen, tally.total)
    return _finish(job, tally, count=len(wanted))


class _Tally:
    """Counts what could not be used, and stops when it is too much."""

    def __init__(self, total: int, limit: float) -> None:
        self.total = total
        self.limit = limit
        self.seen = self.left_out = self.lost = 0
        self.unreadable: dict[str, str] = {}

    def note(self, about: About) -> None:
        """Counts a shard.

        Raises:
            DataError: if too many conversations are unreadable.
        """
        _, start, stop = about.chunk
        self.seen += stop - start
        self.left_out += about.left_out
        for name, reason in about.unreadable.items():
            logger.warning("left out %s: %s", name, reason)
        self.unreadable |= about.unreadable
        self.lost += len(about.unreadable)
        if self.lost > self.limit * self.total:
            first = itertools.islice(self.unreadable.items(), 3)
            shown = "; ".join(f"{name}: {reason}" for name, reason in first)
            raise DataError(
                f"{self.lost} of {self.total} conversations cannot be tokenised, more"
                f" than the share --max-unreadable {self.limit} allows. First: {shown}. Mend or"
                " exclude them, or raise it; shards that stand are kept."
            )


def _standing(output: Path, settings: Settings, wanted: Sequence[Chunk]) -> set[int]:
    """Numbers of the shards that stand already.

    Raises:
        UsageError: if the folder holds something else.
    """
    if not output.exists():
        return set()
    known = {shard_name(chunk.number): chunk for chunk in wanted}
    files = {path.name for path in output.iterdir() if not path.name.endswith(".partial")}
    shards = {name for name in files if name.startswith("shard-") and name.endswith(".parquet")}
    if foreign := sorted(files - shards - {FILE_NAME, RECORD}):
        raise UsageError(
            f"{output}: holds {', '.join(foreign[:3])}, which are no shards; choose a new folder"
        )
    for name in sorted(shards):
        about = read_about(output / name)
        before = Settings.parse(about.settings)
        if before != settings:
            raise UsageError(
                f"{output / name}: was made with other settings ({changed(before, settings)});"
                " build with those again, or choose a new folder"
            )
        if name not in known or about.chunk != known[name][1:]:
            raise UsageError(f"{output / name}: is no shard of this build; remove it")
    return {known[name].number for name in shards}


def _run(job: _Job, missing: Sequence[Chunk], *, workers: int) -> Iterator[Chunk]:
    """Makes shards; yields each chunk when its file stands."""
    if missing and (workers <= 1 or len(missing) == 1):
        maker = _Maker(job)
        for chunk in missing:
            maker.make(chunk)
            yield chunk
    if not missing or workers <= 1 or len(missing) == 1:
        return
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn"))
    try:
        tasks = [pool.submit(_make, job, chunk) for chunk in missing]
        for task in as_completed(tasks):
            yield task.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Maker:
    """Makes shards in one process."""

    def __init__(self, job: _Job) -> None:
        self.settings = job.settings
        self.output = job.output
        self.tokenization = Tokenization(job.model, device=job.device)
        # Its own sizes are not those of a limited build, but chunks say what is read.
        self.inputs = Inputs(
            job.source,
            splits=[part for part, _ in job.settings.parts if part],
        )

    def make(self, chunk: Chunk) -> None:
        """Writes the shard of a chunk."""
        rules = Rules(self.settings.eval_fraction, self.settings.max_length)
        rows: list[Row] = []
        unreadable: dict[str, str] = {}
        left_out = 0
        with self.tokenization.one_thread():
            for indices in chunk.blocks(self.settings.batch_size):
                block = self.tokenization.block(self.inputs, chunk.part, indices, rules=rules)
                rows += block.rows
                unreadable |= block.unreadable
                left_out += block.left_out
        about = About(self.settings.data(), chunk[1:], unreadable, left_out)
        write_rows(self.output / shard_name(chunk.number), rows, about)


_OF_THIS_PROCESS: list[_Maker] = []


def _make(job: _Job, chunk: Chunk) -> Chunk:
    """Runs in a worker, which serves one job; its codecs are opened with the first chunk."""
    if not _OF_THIS_PROCESS:
        _OF_THIS_PROCESS.append(_Maker(job))
    _OF_THIS_PROCESS[0].make(chunk)
    return chunk


def _finish(job: _Job, tally: _Tally, *, count: int) -> ShardsRecord:
    """Writes shards.json, from what the files hold."""
    output = job.output
    splits: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    positions = 0
    shards = []
    for file in map(shard_name, range(count)):
        table = read_table(output / file)
        splits.update(table["split"].to_pylist())
        tasks.update(table["task"].to_pylist())
        positions += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        shards.append(ShardRecord(file=file, sha256=file_hash(output / file), rows=table.num_rows))
    record = ShardsRecord(
        settings=job.settings,
        path=job.source.path,
        splits=dict(sorted(splits.items())),
        tasks=dict(sorted(tasks.items())),
        positions=positions,
        unreadable=dict(sorted(tally.unreadable.items())),
        left_out=tally.left_out,
        shards=tuple(shards),
    )
    write_record(output, record)
    return record
