"""Writes the generated pages from the code itself: `hatch run docs`.

cli.md comes from the commands' own help; reference/ from hook specifications, interfaces and
configs. With --check it changes nothing and fails if a page is stale; a test does that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent))

import reference

from xoron_core.cli.app import app

HERE = Path(__file__).parent
HEAD = "# The command line\n\nWritten by `hatch run docs` from the commands' own help.\n"


def commands() -> str:
    """Returns the page of the command line: the help of every command."""
    return HEAD + "".join(_sections(typer.main.get_command(app), "xoron"))


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": commands,
    "reference/hooks.md": reference.hooks,
    "reference/kinds.md": reference.kinds,
    "reference/configs.md": reference.configs,
}


def _sections(command: Any, name: str) -> list[str]:
    context = command.context_class(
        command, info_name=name, terminal_width=88, max_content_width=88, color=False
    )
    sections = [f"\n## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"]
    if hasattr(command, "list_commands"):
        for sub in command.list_commands(context):
            sections += _sections(command.get_command(context, sub), f"{name} {sub}")
    return sections


def main() -> int:
    """Writes or checks the pages."""
    stale = []
    for name, render in PAGES.items():
        target, page = HERE / name, render()
        if target.exists() and target.read_text(encoding="utf-8") == page:
            continue
        stale.append(name)
        if "--check" not in sys.argv[1:]:
            target.parent.mkdir(exist_ok=True)
            target.write_text(page, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)} is stale; run: hatch run docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
