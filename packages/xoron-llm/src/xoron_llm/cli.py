"""`xoron tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.errors import FolderError


def tokenizer(
    texts: Annotated[list[Path], typer.Argument(help="Text files to learn from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The tokenizer.json to write.")],
    size: Annotated[int, typer.Option("--size", help="Ids at most, 256 bytes among them.")] = 4096,
) -> None:
    """Learn a byte-level BPE tokenizer from text files.

    Compose with it: xoron compose --set tokenizer.use=bpe --set tokenizer.source=FILE ...

    Example: xoron tokenizer corpus/*.txt --size 4096 -o tokenizer.json
    """
    from xoron_llm.tokenizers.trained import learn, write

    learned = learn(_read(texts), size=size)
    write(learned, output)
    typer.echo(f"{output}: {learned.get_vocab_size()} ids")


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FolderError(f"{path}: cannot be read as UTF-8 text ({error})") from None
