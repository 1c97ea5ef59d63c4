"""Writes docs/cli.md from the commands themselves: `hatch run docs`.

With --check it changes nothing and fails if the file is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from xoron_core.cli.app import app

TARGET = Path(__file__).with_name("cli.md")
HEAD = "# The command line\n\nWritten by `hatch run docs` from the commands' own help.\n"


def render() -> str:
    """Returns the page: the help of every command."""
    return HEAD + "".join(_sections(typer.main.get_command(app), "xoron"))


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
    """Writes or checks the page."""
    page = render()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page:
            print(f"{TARGET.name} is stale; run: hatch run docs", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
