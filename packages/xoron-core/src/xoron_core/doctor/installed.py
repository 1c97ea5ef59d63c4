"""Examines the installed plug-ins and the versions they were declared to work with. No torch.

An editable installation stores its entry points when it is made: a source folder that has moved, or
whose entry points were edited since, leaves a plug-in that is half there. Both are named.
"""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from xoron_core.doctor.finding import Finding
from xoron_core.plugins import GROUP, Plugin, Registry

# Shown even when all is well; other requirements are counted.
_SHOWN = ("torch", "transformers")


def examine_plugins(registry: Registry) -> Iterator[Finding]:
    """Each plug-in's state and version, and installations that are out of date."""
    for plugin in registry.plugins:
        yield _plugin(plugin)
    found: dict[str, list[importlib.metadata.Distribution]] = {}
    for dist in plugin_distributions():
        found.setdefault(str(canonicalize_name(dist.metadata["Name"])), []).append(dist)
    for name, dists in found.items():
        if len({str(dist.locate_file("")) for dist in dists}) > 1:
            places = " and ".join(f"{d.version} in {d.locate_file('')}" for d in dists)
            fix = f"run: pip uninstall {name}, once for each, then install it again"
            yield Finding("plug-in", name, "wrong", f"is installed twice: {places}", fix)
        if problem := _stale(dists[0]):
            yield problem


def plugin_distributions() -> list[importlib.metadata.Distribution]:
    """Installed distributions with entry points in the group `xoron`, found twice or not."""
    return [
        dist
        for dist in importlib.metadata.distributions()
        if any(point.group == GROUP for point in dist.entry_points)
    ]


def examine_versions() -> Iterator[Finding]:
    """What the plug-ins' distributions require against what is installed."""
    bounds: dict[str, list[tuple[str, Requirement]]] = {}
    for dist in plugin_distributions():
        owner = dist.metadata["Name"]
        for text in dist.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement as error:
                fix = f"report it to the authors of {owner}"
                yield Finding("version", owner, "wrong", f"requires {text!r} ({error})", fix)
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = str(canonicalize_name(requirement.name))
                bounds.setdefault(name, []).append((owner, requirement))
    well = 0
    for name, wanted in sorted(bounds.items()):
        finding = _version(name, wanted)
        if finding.state != "ok" or name in _SHOWN:
            yield finding
        else:
            well += 1
    yield Finding("version", "others", "ok", f"{well} other requirements are met")


def _plugin(plugin: Plugin) -> Finding:
    origin = plugin.origin
    what = f"{origin.distribution} {origin.version}"
    if plugin.state == "available":
        return Finding("plug-in", plugin.name, "ok", what)
    if plugin.state == "disabled":
        return Finding("plug-in", plugin.name, "note", f"{what}, disabled: {plugin.problem}")
    dist = origin.distribution
    parents = (plugin.module, plugin.module.partition(".")[0])
    if any(f"No module named {module!r}" in plugin.problem for module in parents):
        detail = f"{what} has a stale entry point: its module {plugin.module} is gone"
        fix = (
            f"install it again (pip install --force-reinstall {dist}, or pip install -e on its"
            f" source), or: pip uninstall {dist}"
        )
    else:
        detail = f"{what} is {plugin.state}: {plugin.problem}"
        fix = f"run: pip install --upgrade {dist}, or: pip uninstall {dist}"
    return Finding("plug-in", plugin.name, "wrong", detail, fix)


def _stale(dist: importlib.metadata.Distribution) -> Finding | None:
    """What is out of date in an editable installation, or None."""
    direct = json.loads(dist.read_text("direct_url.json") or "{}")
    if not direct.get("dir_info", {}).get("editable"):
        return None
    name = dist.metadata["Name"]
    source = Path(url2pathname(urlparse(direct["url"]).path))
    project = source / "pyproject.toml"
    if not project.is_file():
        return Finding(
            "plug-in",
            name,
            "wrong",
            f"is an editable installation of {source}, which is gone",
            f"run: pip install -e on the folder's new place, or: pip uninstall {name}",
        )
    try:
        declared = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
    except tomllib.TOMLDecodeError as error:
        return Finding("plug-in", name, "wrong", f"{project}: {error}", "correct the file")
    if "entry-points" in declared.get("dynamic", ()):
        return None
    stored = {point.name: point.value for point in dist.entry_points if point.group == GROUP}
    now = declared.get("entry-points", {}).get(GROUP, {})
    if stored == now:
        return None
    detail = f"its entry points were changed after the installation: {stored} became {now}"
    return Finding("plug-in", name, "wrong", detail, f"run: pip install -e {source}")


def _version(name: str, wanted: Sequence[tuple[str, Requirement]]) -> Finding:
    """Compares one installed version with every bound on it."""
    bounds = sorted(
        {str(requirement.specifier) for _, requirement in wanted if requirement.specifier}
    )
    specifiers = ",".join(bounds)
    said = f"{specifiers or 'any'} by {', '.join(owner for owner, _ in wanted)}"
    fix = f'run: pip install "{name}{specifiers}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("version", name, "wrong", f"is not installed; wanted {said}", fix)
    if all(r.specifier.contains(version, prereleases=True) for _, r in wanted):
        return Finding("version", name, "ok", f"{version} (wanted {said})")
    return Finding("version", name, "wrong", f"{version} is installed; wanted {said}", fix)
