"""The options that `xoron generate` and `xoron chat` share, and what both do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xoron_core import advice
from xoron_core.cli.progress import working
from xoron_core.errors import PluginError, UsageError

if TYPE_CHECKING:
    from xoron_core.session import Session

Folder = Annotated[Path, typer.Argument(help="A model folder.")]
System = Annotated[str | None, typer.Option("--system", help="A system message.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k best; 0 for all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep this probability mass.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Keep what has this share of the best probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 avoids what stands there already.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="For sampling.")]
Draft = Annotated[
    Path | None, typer.Option("--draft", help="A smaller model's folder that drafts text.")
]
Deltas = Annotated[
    list[Path] | None,
    typer.Option("--delta", help="Trained slots or rows over the model; again for more."),
]
Image = Annotated[
    list[str] | None,
    typer.Option("--image", help="An image before the text of the message; again for more."),
]
Media = Annotated[
    list[str] | None,
    typer.Option("--media", help="TYPE=PATH: as --image, for any type of medium."),
]


def check_limit(max_new_tokens: int) -> None:
    """Refuses a limit that allows no token.

    Raises:
        UsageError: naming the option.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")


def media_parts(images: Sequence[str] | None, media: Sequence[str] | None) -> list[dict[str, str]]:
    """What --image and --media name, as parts of a message: images first, each in order.

    Raises:
        UsageError: for a --media that is not TYPE=PATH.
    """
    parts = [{"type": "image", "path": path} for path in images or ()]
    for item in media or ():
        kind, _, path = item.partition("=")
        if not (kind and path):
            raise UsageError(f"--media {item!r}: expected TYPE=PATH, such as image=cat.png")
        parts.append({"type": kind, "path": path})
    return parts


def open_session(
    folder: Path,
    draft: Path | None,
    *,
    parts: Sequence[dict[str, str]] = (),
    deltas: Sequence[Path] = (),
) -> Session:
    """Loads a model folder, and a draft model's if one is given, into a session.

    Media are read and laid out before any weights are, so that a wrong path costs no time. Not so
    with deltas, which may bring the part that reads them.

    Args:
        folder: of the model.
        draft: of a smaller model, or None.
        parts: media that the first message will hold.
        deltas: folders of slots or rows to put over the model, in this order.

    Raises:
        DataError, PluginError, SequenceError: if the model cannot be shown these media.
    """
    from xoron_core.api import load
    from xoron_core.folder import read_config
    from xoron_core.processor import XoronProcessor
    from xoron_core.session import Session

    _, composition = read_config(folder)
    if not composition.of_kind("backbone"):
        raise PluginError(advice.empty_slot("backbone", composition.slots))
    if parts and not deltas:
        XoronProcessor.from_pretrained(folder).plan([{"role": "user", "content": list(parts)}])
    with working(f"loading {folder}"):
        model, processor = load(folder, deltas=deltas)
        drafter = load(draft)[0] if draft else None
    return Session(model, processor, draft=drafter)
