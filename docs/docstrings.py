"""Google-style docstrings to Markdown, for the generated reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ENTRY = re.compile(r"(\*{0,2}[\w, .`*]+?): (.*)")


def text(thing: object) -> str:
    """The prose of a docstring before its sections."""
    return _split(thing)[""]


def entries(thing: object, section: str) -> dict[str, str]:
    """What a section says of each name; names that share a line share what it says."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _split(thing).get(section, "").splitlines():
        match = _ENTRY.fullmatch(line)
        if match and not line.startswith(" "):
            names = [name.strip(" *`") for name in match[1].split(",")]
            found.update(dict.fromkeys(names, match[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


def section(thing: object, name: str) -> str:
    """A section whole, as one paragraph."""
    return " ".join(_split(thing).get(name, "").split())


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; pipes and line breaks in cells are escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _split(thing: object) -> dict[str, str]:
    """A docstring by section; the prose before the first is under an empty name."""
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.removesuffix(":") in _SECTIONS and line.endswith(":"):
            current = line.removesuffix(":")
            parts[current] = []
        else:
            parts[current].append(line)
    return {name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in parts.items()}
