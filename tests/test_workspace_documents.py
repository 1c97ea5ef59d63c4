"""Proves that the documents name commands, files and packages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
COMMAND = re.compile(r"hatch run ([\w.-]+)(?::([\w-]+))?")


@pytest.fixture(scope="module")
def documents(root: Path) -> dict[str, str]:
    paths = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("packages/*/*.md")]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}


def test_relative_links_lead_somewhere(root: Path, documents: dict[str, str]) -> None:
    links = [(name, target) for name, text in documents.items() for target in LINK.findall(text)]
    assert links
    dead = [
        (name, target)
        for name, target in links
        if not (root / name).parent.joinpath(target).exists()
    ]
    assert not dead


def test_commands_of_hatch_exist(hatch, documents: dict[str, str]) -> None:
    environments = hatch["envs"]
    problems, count = [], 0
    for name, text in documents.items():
        for first, second in COMMAND.findall(text):
            environment, script = (first, second) if second else ("default", first)
            scripts = environments.get(environment.partition(".")[0], {}).get("scripts", {})
            count += 1
            if script not in scripts and script not in {"python", "xoron"}:
                problems.append(f"{name}: hatch run {first}{':' * bool(second)}{second}")
    assert count > 3
    assert not problems


def test_readme_and_changelog_name_every_package(members, documents: dict[str, str]) -> None:
    for name, member in members.items():
        assert f"packages/{name}" in documents["README.md"]
        assert f"packages/{name}/CHANGELOG.md" in documents["CHANGELOG.md"]
        for required in ("README.md", "CHANGELOG.md"):
            assert (member.folder / required).is_file()
