"""Proves docs/plugin-guide.md by following it: its files, put together, are the example to the
letter, and its commands and code run in order on the package that they make.

The one block that installs from an index is marked `<!-- fresh -->`, for CI to run in a place of
its own; here its `xoron` commands are only compared with the command line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "plugin-guide.md"
EXAMPLE = ROOT / "examples" / "xoron-timeseries"
BLOCK = re.compile(r"^```(\w+)(?: +([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Language, what stands behind it, and text of every block, in order."""
    return BLOCK.findall(GUIDE.read_text(encoding="utf-8"))


def files() -> dict[str, str]:
    """What the guide writes: blocks of one file follow each other with two blank lines between."""
    parts: dict[str, list[str]] = {}
    for _, info, text in blocks():
        if info.startswith("file="):
            parts.setdefault(info.removeprefix("file="), []).append(text)
    return {path: "\n\n".join(texts) for path, texts in parts.items()}


def test_every_block_is_run_or_written() -> None:
    unknown = [info for _, info, _ in blocks() if info != "run" and not info.startswith("file=")]
    assert unknown == [""], "only the block from nothing is neither"


def test_the_files_of_the_guide_are_the_example() -> None:
    written = files()
    for path, text in written.items():
        assert text == (EXAMPLE / path).read_text(encoding="utf-8"), path
    sources = {str(path.relative_to(EXAMPLE)) for path in (EXAMPLE / "src").rglob("*.py")}
    assert sources - set(written) == {"src/xoron_timeseries/__init__.py"}


@pytest.fixture
def workshop(tmp_path) -> dict[str, str]:
    """A folder with the guide's package in it, and an environment that sees it as installed."""
    package = tmp_path / "xoron-timeseries"
    for path, text in files().items():
        target = package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for name in ("__init__.py", "py.typed"):
        (package / "src" / "xoron_timeseries" / name).touch()
    info = package / "src" / "xoron_timeseries-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: xoron-timeseries\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text("[xoron]\ntimeseries = xoron_timeseries.plugin\n")
    path = [str(package / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.mark.slow
def test_the_commands_and_the_code_run_in_order(workshop, tmp_path) -> None:
    xoron = [sys.executable, "-c", "from xoron_core.cli import main; main()"]
    ran = []
    for language, info, text in blocks():
        if info != "run":
            continue
        commands = [[sys.executable, "-c", text]]
        if language == "sh":
            lines = [shlex.split(line) for line in text.splitlines()]
            assert all(line[0] == "xoron" for line in lines)
            commands = [[*xoron, *line[1:]] for line in lines]
        for command in commands:
            done = subprocess.run(
                command, cwd=tmp_path, env=workshop, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            ran.append(done.stdout)
    assert len(ran) == 4
    assert (tmp_path / "xoron-ecg" / "src" / "xoron_ecg" / "encoder.py").is_file()
    assert float(ran[2]) < 0.5, "the wave was learned"
    assert (tmp_path / "waves" / "config.json").is_file()


def test_the_block_from_nothing_names_commands_that_exist() -> None:
    surface = json.loads((ROOT / "tests" / "data" / "cli_surface.json").read_text())
    (text,) = re.findall(r"<!-- fresh -->\n```sh\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("xoron")]
    assert commands
    for words in commands:
        name = max((n for n in surface if f"{' '.join(words)} ".startswith(f"{n} ")), key=len)
        known = {option for entry in surface[name] for option in entry.split("/")}
        assert {word for word in words if word.startswith("-")} <= known, words
