"""Proves that a wheel holds its whole package: code, data files and the `py.typed` marker.

Data files go missing silently: a pattern of `.gitignore` is also a pattern of the build.
"""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

# Data files each package cannot do without, by suffix.
DATA = {
    "xoron-core": {".json", ".jinja", ".tmpl"},
    "xoron-llm": {".yaml"},
    "xoron-audio": {".yaml"},
    "xoron-train": {".yaml"},
    "xoron-vision": {".yaml"},
}


@pytest.fixture(scope="module")
def wheels(members, tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """Every member's wheel, built from the working tree with its own build back-end."""
    folder = tmp_path_factory.mktemp("wheels")
    opened = {}
    for member in members.values():
        done = subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
            cwd=member.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (path,) = folder.glob(f"{member.package}-*.whl")
        opened[member.name] = zipfile.ZipFile(path)
    return opened


def source_files(source: Path) -> set[str]:
    return {
        path.relative_to(source.parent).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_holds_every_file_of_its_package_and_no_other(wheels, members) -> None:
    for name, member in members.items():
        inside = {entry for entry in wheels[name].namelist() if ".dist-info/" not in entry}
        expected = source_files(member.source)
        assert f"{member.package}/py.typed" in expected
        assert inside == expected, name


def test_packages_ship_their_data_files(wheels) -> None:
    for name, expected in DATA.items():
        inside = {Path(entry).suffix for entry in wheels[name].namelist()}
        assert expected <= inside, name


def test_a_wheel_names_version_licence_and_entry_points(root, wheels, members) -> None:
    version = (root / "VERSION").read_text(encoding="utf-8").strip()
    licence = (root / "LICENSE").read_bytes()
    for name, member in members.items():
        info = f"{member.package}-{version}.dist-info"
        metadata = message_from_bytes(wheels[name].read(f"{info}/METADATA"))
        assert metadata["Version"] == version
        assert metadata["License-Expression"] == "MIT"
        assert wheels[name].read(f"{info}/licenses/LICENSE") == licence
        entries = configparser.ConfigParser()
        entries.read_string(wheels[name].read(f"{info}/entry_points.txt").decode())
        for module in entries["xoron"].values():
            assert f"{module.replace('.', '/')}.py" in wheels[name].namelist()


def test_versions_agree_from_an_sdist_too(root, members, tmp_path) -> None:
    """A wheel built from the sdist alone, without the root's VERSION file in reach."""
    member = members["xoron-core"]
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=member.folder, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(tmp_path)], check=True)
    unpacked = archive.with_name(archive.name.removesuffix(".tar.gz"))
    done = subprocess.run([*build, "-t", "wheel"], cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = (root / "VERSION").read_text(encoding="utf-8").strip()
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"{member.package}-{version}-py3-none-any.whl"
    inside = {entry for entry in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in entry}
    assert inside == source_files(member.source)
