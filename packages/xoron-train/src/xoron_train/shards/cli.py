"""`xoron tokens build|audit|migrate-shards`: the command line of this package's functions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xoron_train.data.config import SourceConfig
    from xoron_train.shards.record import ShardsRecord

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def build(
    dataset: Annotated[
        str,
        typer.Argument(help="A data set's name, or a path or glob of .jsonl or .parquet files."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of shards.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of the model with the codecs.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the data set: samples=1000.")
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", help="The column that holds the messages.")
    ] = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="A split of the data set; else all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many of each split.")
    ] = None,
    eval_fraction: Annotated[
        float,
        typer.Option("--eval-fraction", min=0, max=0.5, help="Held-out share of files' media."),
    ] = 0.02,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Most positions of a conversation.")
    ] = None,
    max_unreadable: Annotated[
        float,
        typer.Option("--max-unreadable", min=0, max=1, help="Share that may be unreadable."),
    ] = 0.01,
    shard_size: Annotated[
        int, typer.Option("--shard-size", min=1, help="Conversations of a shard.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Conversations encoded together.")
    ] = 16,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 1,
    device: Annotated[str, typer.Option("--device", help="That codecs run on.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Tokenise conversations: their media become ids of the model's codecs.

    An interrupted build goes on when the same line is run again. The bytes written depend neither
    on that nor on the number of workers.

    Example: xoron tokens build vision-digits --set samples=1000 --model out -o shards
    """
    from xoron_train.shards.build import build as write

    record = write(
        _source(dataset, overrides or [], field),
        output,
        model=model,
        splits=splits or (),
        limit=limit,
        eval_fraction=eval_fraction,
        max_length=max_length,
        max_unreadable=max_unreadable,
        shard_size=shard_size,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    _print(output, record, as_json=as_json)


def audit(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model they were made with.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Where the conversations lie now, if moved.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Rows to tokenise again, media to decode.")
    ] = 64,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Most positions of a row.")
    ] = None,
    max_duplicates: Annotated[
        float,
        typer.Option("--max-duplicates", min=0, max=1, help="Share of rows with the same ids."),
    ] = 0.01,
    as_json: Json = False,
) -> None:
    """Examine shards; exits with 1 if a check fails.

    With --model, a sample of the source is tokenised again and a sample of media is decoded.

    Example: xoron tokens audit shards --model out
    """
    from xoron_core.cli.plugin_list import print_table
    from xoron_train.shards.audit import audit as examine

    findings = examine(
        folder,
        model=model,
        source=source,
        samples=samples,
        max_length=max_length,
        max_duplicates=max_duplicates,
    )
    failed = any(finding.passed is False for finding in findings)
    if as_json:
        found = [finding._asdict() for finding in findings]
        typer.echo(json.dumps({"passed": not failed, "checks": found}))
    else:
        words = {True: "ok", False: "FAILED", None: "not run"}
        rows = [(one.check, words[one.passed], one.detail) for one in findings]
        print_table([("CHECK", "RESULT", "DETAIL"), *rows])
    if failed:
        raise typer.Exit(1)


def migrate_shards(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
    to: Annotated[Path, typer.Option("--to", help="A model folder with the space to move to.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
) -> None:
    """Move shards to the token space of a model: every id by the name of what it means.

    `xoron tokens migrate` does the same with a folder of shards.

    Example: xoron tokens migrate-shards shards --to theirs -o moved
    """
    import logging

    from xoron_train.shards.migrate import migrate_shards as move
    from xoron_train.shards.record import read_record

    move(folder, to, output)
    space = read_record(output).settings.token_space_hash
    logging.getLogger("xoron").info("wrote %s, %s", output, space)


def _print(output: Path, record: ShardsRecord, *, as_json: bool) -> None:
    """Says what was built."""
    shown: dict[str, Any] = {
        "folder": str(output),
        "rows": record.rows,
        "positions": record.positions,
        "splits": record.splits,
        "tasks": record.tasks,
        "unreadable": record.unreadable,
        "left_out": record.left_out,
        "shards": len(record.shards),
        "token_space": record.settings.token_space_hash,
    }
    if as_json:
        typer.echo(json.dumps(shown))
        return
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {of}" for key, of in value.items()) or "none"
        typer.echo(f"{name.replace('_', ' ')}: {value}")


def _source(dataset: str, overrides: list[str], field: str | None) -> SourceConfig:
    """A data set by its name, or files by their path."""
    from xoron_core.config import apply_overrides
    from xoron_core.errors import UsageError
    from xoron_train.data.config import SourceConfig

    if dataset.endswith((".jsonl", ".parquet")) or os.sep in dataset:
        if overrides:
            raise UsageError("--set gives options of a data set, and files have none; remove it")
        path = str(Path(dataset).expanduser().absolute())  # so that an audit finds it again
        return SourceConfig.parse({"kind": "conversations", "path": path, "field": field})
    if field is not None:
        raise UsageError("--field names a column of files, and a data set has none; remove it")
    options = apply_overrides({}, overrides)
    return SourceConfig.parse({"kind": "dataset", "path": dataset, "options": options})
