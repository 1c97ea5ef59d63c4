"""What the tests share: the members' own metadata, the toy plug-in, a lively text model."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.distributions import toy_installed
from tests.lively import lively
from xoron_core.session import Session


@pytest.fixture
def toy() -> Iterator[None]:
    """The toy distribution, discovered on the path as an installed one is."""
    with toy_installed():
        yield


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub cannot be reached, and nothing of it is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def loud() -> tuple[Any, Any, Session]:
    """A lively text model, its processor and a session of both."""
    model, processor = lively()
    return model, processor, Session(model, processor)


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
