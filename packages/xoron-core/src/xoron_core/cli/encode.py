"""`xoron encode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.progress import working
from xoron_core.errors import FolderError, UsageError


def encode(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    media: Annotated[list[str], typer.Argument(help="Files to encode.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The safetensors file to write.")],
    slot: Annotated[str, typer.Option("--slot", help="The encoder's slot.")] = "image.encoder",
    features: Annotated[
        bool, typer.Option("--features", help="Stop before the projector.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Files at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Encode files to features; needs no language model.

    The file holds values (items, positions, width), mask (items, positions), and the files' names
    in its metadata.

    Example: xoron encode out/ cat.png dog.jpg -o features.safetensors
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from xoron_core.api import load

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected 1 or more")
    with working(f"loading {folder}"):
        model, _ = load(folder)
    with working(f"encoding {len(media)} files"):
        made = model.encode(media, slot=slot, project=not features, batch_size=batch_size)
    tensors = {"values": made.values, "mask": made.mask}
    if made.positions is not None:
        tensors["positions"] = made.positions
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"slot": slot, "media": json.dumps(media), "projected": str(not features).lower()}
    try:
        save_file(tensors, output, metadata)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{output}: cannot be written ({error})") from None
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if as_json:
        print(json.dumps({"output": str(output), "slot": slot, "media": media, "shapes": shapes}))
    else:
        items, positions, width = shapes["values"]
        print(f"{output}: {items} x {positions} positions of {width}")
