"""The options that `xoron generate` and `xoron chat` share, and what both do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xoron_core.cli.progress import working
from xoron_core.errors import UsageError

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


def check_limit(max_new_tokens: int) -> None:
    """Refuses a limit that allows no token.

    Raises:
        UsageError: naming the option.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")


def open_session(folder: Path, draft: Path | None) -> Session:
    """Loads a model folder, and a draft model's if one is given, into a session."""
    from xoron_core.api import load
    from xoron_core.session import Session

    with working(f"loading {folder}"):
        model, processor = load(folder)
        drafter = load(draft)[0] if draft else None
    model.need_backbone()
    return Session(model, processor, draft=drafter)
