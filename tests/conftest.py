"""What the tests of the workspace share: the root folder and the members' own metadata."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@dataclass(frozen=True)
class Member:
    """A package of the workspace, as its `pyproject.toml` declares it."""

    folder: Path
    project: dict[str, Any]

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def package(self) -> str:
        """The import name."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.package

    @property
    def dependencies(self) -> set[str]:
        return _names(self.project["dependencies"])

    @property
    def extras(self) -> set[str]:
        groups = self.project.get("optional-dependencies", {}).values()
        return set().union(*(_names(group) for group in groups))


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def hatch(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "hatch.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tools(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


@pytest.fixture(scope="session")
def members(root: Path) -> dict[str, Member]:
    """Every member by distribution name."""
    found = [
        Member(path.parent, tomllib.loads(path.read_text(encoding="utf-8"))["project"])
        for path in sorted(root.glob("packages/*/pyproject.toml"))
    ]
    assert found, "no package found"
    return {member.name: member for member in found}
