"""`xoron tokens show|verify|diff|migrate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.groups import ExtensibleGroup, plugin_command
from xoron_core.cli.plugin_list import print_table
from xoron_core.cli.progress import working
from xoron_core.descriptors import resolve
from xoron_core.errors import FolderError, TokenSpaceError, UsageError
from xoron_core.tokens.space import TokenSpace

logger = logging.getLogger("xoron")
app = typer.Typer(
    cls=ExtensibleGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show, verify, compare or change token spaces.\n\nExample: xoron tokens show out/",
)


@app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="A model folder or a token_space.json.")],
    specials: Annotated[bool, typer.Option("--specials", help="List every special token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the canonical JSON.")] = False,
) -> None:
    """Show ranges, row count and hash.

    Example: xoron tokens show out/ --specials
    """
    space = _read(folder)
    if as_json:
        print(space.to_json())
        return
    print(f"{space.size:,} rows, {space.hash}")
    rows = [("RANGE", "KIND", "FIRST", "SIZE", "STATE")]
    for found in space.ranges:
        state = "hole" if found.removed else ""
        rows.append((found.name, found.kind, str(found.start), str(found.size), state))
    print_table(rows)
    if specials:
        print_table(
            [("ID", "STRING", "TOKEN")]
            + [(str(s.id), s.string, s.key + (" (alias)" if s.alias else "")) for s in space]
        )


@app.command("verify")
def verify(folder: Annotated[Path, typer.Argument(help="A model folder.")]) -> None:
    """Check that config, token space, tokenizer and weights of a folder agree.

    Example: xoron tokens verify out/
    """
    space = _read(folder)
    if not folder.is_dir():
        print(f"ok: {space.hash}")
        return
    from transformers import AutoTokenizer

    from xoron_core.folder import check_files, read_config, read_space

    config, composition = read_config(folder)
    read_space(folder, config.token_space_hash)
    if composition.of_kind("tokenizer"):
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        for special in space:
            found = vocabulary.get(special.string)
            if found != special.id:
                raise TokenSpaceError(
                    f"{folder}: tokenizer.json has {special.string!r} at {found}, the token space"
                    f" at {special.id}; restore the folder's own tokenizer.json"
                )
    if config.vocab_size is not None and config.vocab_size < space.size:
        raise TokenSpaceError(
            f"{folder}: config.json says {config.vocab_size} rows, the token space {space.size}"
        )
    check_files(folder)
    print(json.dumps({"ok": True, "hash": space.hash, "rows": space.size}))


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(help="A model folder or a token_space.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say by name what two token spaces do not have in common.

    Example: xoron tokens diff old/ new/
    """
    from xoron_core.tokens.difference import difference

    old, new = _read(first), _read(second)
    changes = difference(old, new)
    if as_json:
        print(json.dumps({"same": old.hash == new.hash, "changes": [vars(c) for c in changes]}))
        return
    if old.hash == new.hash:
        print(f"the same: {old.hash}")
        return
    rows = [("CHANGE", "NAME", "IDS OR MEANING")]
    print_table(rows + [(change.what, change.name, change.detail) for change in changes])
    if not changes:
        print("they differ in holes alone: every name has the same ids in both")


@app.command("migrate")
def migrate(
    folder: Annotated[Path, typer.Argument(help="A folder: a model, trained rows or shards.")],
    to: Annotated[Path, typer.Option("--to", help="The folder or file of the space to move to.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Of trained rows: the model they belong to.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For rows that are new.")] = 0,
) -> None:
    """Move a model to another token space: its vocabulary rows by name, and its tokenizer.

    Trained rows are moved by name too; they then belong to their base as it is moved under the
    same seed. Shards, as `xoron tokens build` wrote them, move to the space of a model folder.

    Example: xoron tokens migrate mine/ --to theirs/ -o moved/
    """
    if (folder / "shards.json").exists():
        resolve(plugin_command("tokens migrate-shards").target)(folder, to=to, output=output)
        return
    from xoron_core.api import load, save
    from xoron_core.folder import read_config
    from xoron_core.migrate import migrate as move
    from xoron_core.migrate import migrate_rows
    from xoron_core.row_deltas import holds_rows

    space = _read(to)
    rows = holds_rows(folder)
    if rows != (base is not None):
        raise UsageError(
            f"{folder}: holds trained rows; name the model that they belong to: --base DIR"
            if rows
            else f"--base goes with a folder of trained rows, and {folder} is none; leave it out"
        )
    read_config(base or folder)  # `load` would ask the Hub for an absent folder
    with working(f"moving {folder}"):
        if base is None:
            save(*move(*load(folder), space, seed=seed), output)
        else:
            migrate_rows(*load(base), folder, space=space, output=output, seed=seed)
    logger.info("wrote %s, %s", output, space.hash)


def _read(folder: Path) -> TokenSpace:
    if not folder.exists():
        raise FolderError(f"{folder}: there is no such folder or file")
    return TokenSpace.load(folder)
