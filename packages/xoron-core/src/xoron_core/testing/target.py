"""Finds the plug-in under test: installed, a module, or source that is not installed.

An import that hangs or leaves the process would take the kit with it, so the module is first
imported in a process of its own (`Target.probe`); only one that survives is imported here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from xoron_core import hookspecs
from xoron_core.discovery import discover
from xoron_core.errors import UsageError, did_you_mean
from xoron_core.plugins import GROUP, VARIABLE, Plugin, Registry

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("xoron_"))
# Until Python is there, on a busy machine: not the plug-in's time.
START_SECONDS = 5.0
_PROBE = """
import importlib, json, os, sys, threading
def world():
    return {"working directory": os.getcwd(), "environment": dict(os.environ),
            "number of threads": threading.active_count()}
before, known = world(), set(sys.modules)
module = importlib.import_module(sys.argv[1])
for name in sys.argv[2].split(","):
    hook = getattr(module, name, None)
    if hook is not None:
        list(hook() or ())
changed = [what for what, value in world().items() if value != before[what]]
new = {name.partition(".")[0] for name in set(sys.modules) - known}
print("\\n" + json.dumps({"modules": sorted(new), "changed": changed}))
"""


@dataclass(frozen=True)
class Probe:
    """What a process of its own saw of a plug-in's import.

    Attributes:
        problem: why it did not come to its end; empty if it did.
        modules: top-level modules that were imported.
        changed: parts of the process that the import or a hook changed.
        output: what was printed to standard output.
    """

    problem: str = ""
    modules: frozenset[str] = frozenset()
    changed: tuple[str, ...] = ()
    output: str = ""


@dataclass
class Target:
    """A plug-in under test.

    Attributes:
        given: how it was named; finds it again in another process.
        point: its entry point.
        paths: folders that its modules are imported from, where it is not installed.
        others: entry points of the other installed plug-ins.
        seconds: limit of what runs in a process of its own.
        memo: outcomes of checks, by component key and check id (see `xoron_core.testing.run`).
    """

    given: str
    point: importlib.metadata.EntryPoint
    paths: tuple[str, ...] = ()
    others: tuple[importlib.metadata.EntryPoint, ...] = ()
    seconds: float = 60.0
    memo: dict[tuple[str, str], Exception | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in `xoron plugins list`."""
        return self.point.name

    @property
    def distribution(self) -> str:
        """The distribution it comes from; `not installed` for bare source."""
        return self.point.dist.metadata["Name"] if self.point.dist else "not installed"

    @cached_property
    def probe(self) -> Probe:
        """Imports the module and calls its hooks in a process of its own."""
        return self.run(_PROBE, self.point.value, ",".join(HOOKS))

    def run(self, code: str, *arguments: str) -> Probe:
        """Runs Python code in a process of its own; its last line of output is JSON."""
        return _run(code, arguments, paths=self.paths, seconds=self.seconds)

    @contextmanager
    def on_path(self) -> Iterator[None]:
        """Lets its modules be imported, and leaves no trace: others must not find it installed."""
        added = [path for path in self.paths if path not in sys.path]
        sys.path[:0] = added
        try:
            yield
        finally:
            for path in added:
                sys.path.remove(path)

    @property
    def api(self) -> int:
        """The API version it was written for; imports it."""
        with self.on_path():
            return int(importlib.import_module(self.point.value).xoron_api)

    @cached_property
    def registry(self) -> Registry:
        """All usable plug-ins with this one among them; imports them."""
        return discover([*self.others, self.point])

    @cached_property
    def alone(self) -> Registry:
        """Core and this plug-in."""
        return discover([*(p for p in self.others if p.name == "core"), self.point])

    @cached_property
    def plugin(self) -> Plugin:
        """What discovery says of it."""
        return self.registry.plugin(self.name)


def find(given: str) -> Target:
    """Finds a plug-in by its name in `xoron plugins list`, its module, or a path to its source.

    Args:
        given: `llm`; `my_package.plugin`; a folder with `pyproject.toml` or installed metadata; or
            one module file.

    Raises:
        UsageError: if there is no such plug-in, naming the nearest.
    """
    installed = tuple(importlib.metadata.entry_points(group=GROUP))
    path = Path(given)
    if path.suffix == ".py" or path.is_dir():
        return _uninstalled(given, path.resolve(), installed)
    for point in installed:
        if point.name == given:
            others = tuple(other for other in installed if other.name != given)
            # A process of its own does not inherit what this one has put on its path.
            paths = (str(point.dist.locate_file("")),) if point.dist else ()
            return Target(given, point, paths, others)
    for point in installed:
        if point.value == given:
            return find(point.name)
    if "." in given and _has_spec(given):
        point = importlib.metadata.EntryPoint(given.partition(".")[0], given, GROUP)
        return Target(given, point, others=installed)
    names = [point.name for point in installed]
    raise UsageError(
        f"no plug-in {given!r}: it is no installed plug-in ({', '.join(names)}), no module and no"
        f" path.{did_you_mean(given, names)} Give a name, a source folder or a module file"
    )


def _run(code: str, arguments: Sequence[str], *, paths: Sequence[str], seconds: float) -> Probe:
    where = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": where}
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and code
            command, capture_output=True, text=True, timeout=seconds, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(f"did not end within {seconds:g} s")
    output, _, last = done.stdout.rstrip().rpartition("\n")
    if done.returncode != 0 or not last.startswith("{"):
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Probe(f"ended with exit code {done.returncode}: {reason[0]}")
    seen: dict[str, Any] = json.loads(last)
    return Probe("", frozenset(seen["modules"]), tuple(seen["changed"]), output.strip())


class _Source(importlib.metadata.Distribution):
    """A source folder, read as the distribution that would be built from it."""

    def __init__(self, folder: Path, project: Mapping[str, Any]) -> None:
        self._folder = folder
        points = project.get("entry-points", {}).get(GROUP, {})
        lines = [f"{name} = {value}" for name, value in points.items()]
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\n"
            f"Version: {project.get('version', '0')}\n"
            + "".join(f"Requires-Dist: {item}\n" for item in project.get("dependencies", ())),
            "entry_points.txt": "\n".join([f"[{GROUP}]", *lines]),
        }

    def read_text(self, filename: str) -> str | None:
        """A metadata file."""
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        """A file of the distribution."""
        return self._folder / path


def _uninstalled(
    given: str, path: Path, installed: Sequence[importlib.metadata.EntryPoint]
) -> Target:
    if path.is_file():
        folder, points = path.parent, [importlib.metadata.EntryPoint(path.stem, path.stem, GROUP)]
    elif path.is_dir():
        folder, points = _points_of(path)
    else:
        raise UsageError(f"{path}: there is no such file")
    if len(points) != 1:
        names = ", ".join(point.name for point in points) or "none"
        raise UsageError(
            f"{path}: expected one plug-in, found {names}; name its module under"
            f" [project.entry-points.{GROUP}] of pyproject.toml, or give one module file"
        )
    (point,) = points
    others = tuple(p for p in installed if p.name != point.name and p.value != point.value)
    return Target(given, point, (str(folder),), others)


def _points_of(folder: Path) -> tuple[Path, list[importlib.metadata.EntryPoint]]:
    """The folder to import from, and the plug-ins that a source folder declares."""
    file = folder / "pyproject.toml"
    if file.is_file():
        try:
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            source = _Source(folder, project)
        except (KeyError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: is no package's pyproject.toml ({error})") from None
        root = folder / "src" if (folder / "src").is_dir() else folder
        return root, [point for point in source.entry_points if point.group == GROUP]
    found = importlib.metadata.distributions(path=[str(folder)])
    return folder, [point for d in found for point in d.entry_points if point.group == GROUP]


def _has_spec(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
