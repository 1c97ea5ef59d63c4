"""What `xoron generate` and `xoron chat` both do with their options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xoron_core.cli.progress import working
from xoron_core.errors import UsageError

if TYPE_CHECKING:
    from xoron_core.session import Session


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
