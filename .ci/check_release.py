"""Asserts that what lies in `dist/` can be released: `python .ci/check_release.py UV`.

Every package has a wheel and an sdist of the version in VERSION; its changelog has a section for
it; and the wheels install into an empty environment one after the other, each after what it depends
on. After each step `xoron plugins list` knows exactly the packages installed so far, all available.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def dependencies(root: Path) -> dict[str, set[str]]:
    """Every package's dependencies among the packages."""
    projects = [
        tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for path in sorted(root.glob("packages/*/pyproject.toml"))
    ]
    names = {project["name"] for project in projects}
    return {
        project["name"]: {Requirement(text).name for text in project["dependencies"]} & names
        for project in projects
    }


def in_order(needs: Mapping[str, set[str]]) -> list[str]:
    """The packages, each after those it depends on, by name where that leaves a choice.

    Raises:
        ValueError: if they depend on each other in a circle.
    """
    order: list[str] = []
    while len(order) < len(needs):
        ready = sorted(name for name in needs if name not in order and needs[name] <= {*order})
        if not ready:
            raise ValueError(f"{sorted(needs.keys() - {*order})} depend on each other in a circle")
        order.append(ready[0])
    return order


def changelog_problem(text: str, version: str) -> str:
    """What a changelog lacks to release a version, or an empty string.

    Its newest section is `## VERSION`, or that with `, unreleased` or a date, and says something.
    """
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    if not sections:
        return "has no section"
    title, _, body = sections[0].partition("\n")
    if not re.fullmatch(rf"{re.escape(version)}(, (unreleased|\d{{4}}-\d\d-\d\d))?", title.strip()):
        return f"begins with {title.strip()!r}, expected {version!r}"
    return "" if "- " in body else f"says nothing about {version}"


def problems(root: Path) -> list[str]:
    """What is missing in `dist/` and in the changelogs."""
    version = (root / "VERSION").read_text(encoding="utf-8").strip()
    found = []
    for name in dependencies(root):
        stem = f"{name.replace('-', '_')}-{version}"
        for file in (f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"):
            if not (root / "dist" / file).is_file():
                found.append(f"dist/{file} is missing; run: hatch build --all")
        changelog = (root / "packages" / name / "CHANGELOG.md").read_text(encoding="utf-8")
        if problem := changelog_problem(changelog, version):
            found.append(f"packages/{name}/CHANGELOG.md {problem}")
    return found


def install_in_order(root: Path, uv: str) -> None:
    """Installs the wheels one by one into an empty environment and asks `xoron` each time."""
    version = (root / "VERSION").read_text(encoding="utf-8").strip()
    with tempfile.TemporaryDirectory() as folder:
        run([uv, "venv", "--quiet", "--python", sys.executable, folder])
        there = ["core"]
        for name in in_order(dependencies(root)):
            wheel = root / "dist" / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            python = f"{folder}/bin/python"
            # Ours again each time: uv's cache does not notice a rebuilt wheel of one version.
            fresh = ["--reinstall-package", name]
            run([uv, "pip", "install", "--quiet", "--python", python, *fresh, str(wheel)])
            there = sorted({*there, name.removeprefix("xoron-")})
            listed = json.loads(run([f"{folder}/bin/xoron", "plugins", "list", "--json"]))
            states = {plugin["name"]: plugin["state"] for plugin in listed}
            if states != dict.fromkeys(there, "available"):
                raise SystemExit(f"after {wheel.name}: {states}; expected {there}, all available")
            print(f"{wheel.name}: installs; plug-ins: {', '.join(there)}", flush=True)
        run([f"{folder}/bin/xoron", "doctor"])


def run(command: list[str]) -> str:
    """Runs a command and returns its output; its own message is shown where it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with {done.returncode}\n{done.stdout}")
    return done.stdout


def main() -> int:
    """Checks files, changelogs and installation."""
    wrong = problems(ROOT)
    for line in wrong:
        print(f"check_release: {line}", file=sys.stderr)
    if not wrong:
        install_in_order(ROOT, sys.argv[1])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
