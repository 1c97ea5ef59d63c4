"""What the demos in this folder share: their options, their folder, their messages."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that every demo has.

    Args:
        description: for `--help`.
        name: of the demo, for its folder.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, help=f"an empty folder; runs/{name}-N if not given")
    made.add_argument("--smoke", action="store_true", help="only see that everything runs")
    return made


def free_folder(name: str) -> Path:
    """The first of `runs/NAME-1`, `runs/NAME-2`, ... that is not there."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def run(demo: Callable[[], int]) -> int:
    """Runs a demo, shows its progress and returns its exit code; a mistake is one line."""
    # Before transformers is imported, which reads these once.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("xoron")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    from xoron_core.errors import XoronError

    try:
        return demo()
    except XoronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
