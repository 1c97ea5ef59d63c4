"""Examines tokenised conversations: `xoron tokens audit`.

| check | what fails it |
|---|---|
| `files` | a shard that is missing, changed or of other settings; a wrong count |
| `token-space` | a token_space.json, or a model, of another space than the rows' |
| `tokenizer`, `codecs` | a model whose tokenizer, codecs or their weights are others |
| `shapes` | lists of a row that do not fit each other |
| `ids` | an id that means nothing |
| `grammar` | a row that does not parse, or whose media stand elsewhere than it says |
| `splits` | a medium in two splits, or in the wrong one |
| `lengths` | an empty row, or one longer than declared |
| `duplicates` | too many rows with the same ids |
| `retokenise` | a sample of the source that gives other rows now |
| `decode` | a sample of media that do not decode, or to another size |

Without a model, those that need one are not run; without a token space, those that need that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from xoron_core.errors import FolderError, TokenSpaceError, XoronError
from xoron_core.pieces import SpanGrammar
from xoron_core.tokens.space import FILE_NAME, TokenSpace
from xoron_train.data.config import SourceConfig
from xoron_train.shards import checks
from xoron_train.shards.findings import Check, Finding, TableCheck
from xoron_train.shards.record import (
    ShardsRecord,
    file_hash,
    read_record,
)
from xoron_train.shards.rows import read_about, read_table

if TYPE_CHECKING:
    from xoron_train.shards.origin import Origin

_NEEDS_MODEL = ("tokenizer", "codecs", "retokenise", "decode")


class Files(Check):
    """Every shard is the file that the record names, and the record's counts are true."""

    name = "files"

    def __init__(self, folder: Path, record: ShardsRecord) -> None:
        super().__init__()
        self.folder = folder
        self.record = record

    def tables(self) -> Iterator[tuple[pa.Table, int]]:
        """The rows of every shard that can be read, with its number; notes faults on the way."""
        splits: dict[str, int] = {}
        positions = 0
        for number, shard in enumerate(self.record.shards):
            path = self.folder / shard.file
            try:
                if (found := file_hash(path)) != shard.sha256:
                    self.fault(shard.file, f"has {found}, the record says {shard.sha256}")
                if read_about(path).settings != self.record.settings.data():
                    self.fault(shard.file, "was made with other settings than the record says")
                table = read_table(path)
            except FileNotFoundError:
                self.fault(shard.file, "is missing; copy the folder again, whole")
                continue
            except (OSError, FolderError) as error:
                self.fault(shard.file, str(error))
                continue
            if table.num_rows != shard.rows:
                self.fault(shard.file, f"holds {table.num_rows} rows, the record says {shard.rows}")
            for entry in pc.value_counts(table["split"]).to_pylist():
                splits[entry["values"]] = splits.get(entry["values"], 0) + entry["counts"]
            positions += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
            yield table, number
        said = (self.record.splits, self.record.positions)
        if not self.faults and (splits, positions) != said:
            self.fault(
                "the shards", f"hold {splits} and {positions} positions, the record says {said}"
            )

    def passes(self) -> str:
        return f"{len(self.record.shards)} shards, {self.record.rows} rows"


class Space(Check):
    """The token space beside the shards, and the model's, are the one that ids were made with."""

    name = "token-space"

    def __init__(self, folder: Path, record: ShardsRecord, model: Origin | None) -> None:
        super().__init__()
        self.space: TokenSpace | None = None
        expected = record.settings.token_space_hash
        try:
            found = TokenSpace.load(folder / FILE_NAME)
            found.require_same(expected, where="the rows")
            self.space = found  # ids are only judged by the space that they were made with
            if model is not None:
                model.space.require_same(expected, where="the rows")
        except (FolderError, TokenSpaceError) as error:
            self.fault(FILE_NAME, str(error))


def audit(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    source: str | None = None,
    samples: int = 64,
    max_length: int | None = None,
    max_duplicates: float = 0.01,
) -> list[Finding]:
    """Runs every check that can run.

    Args:
        folder: as `build` wrote it.
        model: the model folder that the rows were made with.
        source: where the conversations lie now; None where the record says.
        samples: conversations that are tokenised again, and media that are decoded.
        max_length: most positions of a row; None for what was declared at the build.
        max_duplicates: share of rows that may have the ids of an earlier one.

    Raises:
        FolderError: if the folder holds no complete shards, or the model's is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    found = None
    if model is not None:
        from xoron_train.shards.origin import origin

        found = origin(model)
    space = Space(folder, record, found)
    files = Files(folder, record)
    every: list[Check] = [files, space]
    missing: list[Finding] = []
    every += _of_rows(record, space.space, max_length=max_length, max_duplicates=max_duplicates)
    if space.space is None:
        needs = f"needs the {FILE_NAME} that the rows were made with"
        missing += [Finding(name, None, needs) for name in ("ids", "grammar")]
    if found is None:
        missing += [Finding(name, None, "needs --model") for name in _NEEDS_MODEL]
    else:
        more, not_run = _of_model(record, found, str(model), source=source, samples=samples)
        every, missing = [*every, *more], [*missing, *not_run]
    for table, number in files.tables():
        for check in every:
            if isinstance(check, TableCheck):
                check.feed(table, number)
    return [*(check.finding() for check in every), *missing]


def _of_rows(
    record: ShardsRecord, space: TokenSpace | None, *, max_length: int | None, max_duplicates: float
) -> list[Check]:
    found: list[Check] = [checks.Shapes()]
    if space is not None:
        settings = record.settings
        limits = {codec.name: codec.frames for codec in settings.codecs.values()}
        grammar = SpanGrammar(space, settings.modalities(), limits=limits)
        found += [checks.Ids(space), checks.Grammar(grammar)]
    longest = record.settings.max_length if max_length is None else max_length
    return [
        *found,
        checks.Splits(record.settings.eval_fraction),
        checks.Lengths(longest),
        checks.Duplicates(max_duplicates),
    ]


def _of_model(
    record: ShardsRecord, found: Origin, model: str, *, source: str | None, samples: int
) -> tuple[list[Check], list[Finding]]:
    """The checks that need the model, and those of them that cannot run."""
    from xoron_train.shards.inputs import Inputs
    from xoron_train.shards.model_checks import CodecCheck, Decode, Retokenise, TokenizerCheck
    from xoron_train.shards.tokenize import Tokenization

    settings = record.settings
    every: list[Check] = [TokenizerCheck(settings, found), CodecCheck(settings, found)]
    tokenization = Tokenization(model)
    every.append(Decode(tokenization, shards=len(record.shards), samples=samples))
    config = SourceConfig(
        kind=settings.kind,  # type: ignore[arg-type]  # one of two kinds; pydantic checks it
        path=source or record.path,
        field=settings.column or None,
        options=settings.options,
    )
    try:
        inputs = Inputs(config, splits=[part for part, _ in settings.parts if part])
        inputs.require(settings.fingerprint)
    except XoronError as error:
        return every, [Finding(Retokenise.name, False, f"{error}; --source says where it is now")]
    return [*every, Retokenise(settings, inputs, tokenization, samples=samples)], []
