"""`xoron plugins new`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.plugins import registry

logger = logging.getLogger("xoron")


def new(
    name: Annotated[
        str, typer.Argument(help="The package's name, e.g. xoron-ecg.", metavar="NAME")
    ],
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Kind of component; may be given several times."
        ),
    ] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", metavar="M", help="Kind of media, e.g. ecg.")
    ] = None,
    path: Annotated[
        Path, typer.Option("--path", metavar="DIR", help="Where to write the package's folder.")
    ] = Path(),
) -> None:
    """Write a plug-in package that works, with its tests.

    Kinds: tokenizer, backbone, encoder, projector, codec, autoencoder, generator, fusion, loss.

    Example: xoron plugins new xoron-ecg --kind encoder --kind projector --modality ecg
    """
    from xoron_core.scaffold import design, write

    plan = design(name, kinds or [], modality=modality, registry=registry())
    folder = write(plan, path)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        print(file)
    logger.info("next: pip install -e %s && python -m pytest %s", folder, folder)
