"""Proves that the workspace is what its files say.

A package imports what it declares and declares what it imports; the isolated environments hold
each package's own dependencies and nothing else of ours; one version; the tools know every
package; the environment has torch's CPU build alone; no file names this or that machine.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Declared, never imported by us, and still needed: each with its reason.
INDIRECT = {
    "xoron-core": {
        "accelerate": "transformers loads with device_map through it",
    },
    "xoron-train": {
        "tensorboard": "torch.utils.tensorboard writes through it",
    },
}


@pytest.fixture(scope="module")
def owners() -> dict[str, list[str]]:
    return {
        name: sorted({canonicalize_name(owner) for owner in distributions})
        for name, distributions in importlib.metadata.packages_distributions().items()
    }


def imported(source: Path) -> dict[str, list[tuple[str, bool]]]:
    """Top-level module name to the places that import it and whether that is at import time."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for path in sorted(source.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, eager in walk(tree, eager=True):
            for name in names(node):
                place = f"{path.relative_to(source.parent)}:{node.lineno}"
                found.setdefault(name, []).append((place, eager))
    return found


def walk(node: ast.AST, *, eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs whenever its module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, eager
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from walk(child, eager=eager and not lazy and not typing)


def names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module.partition(".")[0]]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in {"import_module", "find_spec"} and isinstance(node.args[0].value, str):
            return [node.args[0].value.partition(".")[0]]
    return []


def test_the_import_scanner_sees_lazy_guarded_and_named_imports(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(
        "import a.b\n"
        "from c import d\n"
        "from . import e\n"
        "if TYPE_CHECKING:\n    import f\n"
        "def run():\n    import g\n    importlib.import_module('h.i')\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
        "class K:\n    import l\n"
    )
    found = {name: eager for name, places in imported(tmp_path).items() for _, eager in places}
    assert found == {
        "a": True, "c": True, "f": False, "g": False, "h": False, "j": False, "l": True
    }  # fmt: skip


def test_what_is_imported_is_declared(members, owners) -> None:
    problems = []
    for member in members.values():
        for name, places in imported(member.source).items():
            if name in sys.stdlib_module_names or name == member.package:
                continue
            provided = set(owners.get(name, [canonicalize_name(name)]))
            if provided & member.dependencies:
                continue
            where = ", ".join(place for place, _ in places[:3])
            if not provided & member.extras:
                problems.append(f"{member.name} imports {name} undeclared ({where})")
            elif any(eager for _, eager in places):
                problems.append(f"{member.name} needs its extra for {name} on import ({where})")
    assert not problems, "\n".join(problems)


def test_what_is_declared_is_imported(members, owners) -> None:
    problems = []
    for member in members.values():
        used = {
            distribution
            for name in imported(member.source)
            for distribution in owners.get(name, [canonicalize_name(name)])
        }
        declared = member.dependencies | member.extras
        indirect = set(INDIRECT.get(member.name, {}))
        problems += [f"{member.name} declares {name}" for name in declared - used - indirect]
        problems += [f"{member.name}: {name} is no longer indirect" for name in indirect & used]
        problems += [f"{member.name}: {name} is not declared" for name in indirect - declared]
    assert not problems, "\n".join(problems)


def siblings(members, name: str) -> set[str]:
    """In-repository dependencies of a member, direct and indirect."""
    direct = members[name].dependencies & set(members)
    return direct.union(*(siblings(members, other) for other in direct))


def test_isolated_environments_hold_a_package_and_its_own_dependencies(hatch, members) -> None:
    pkg = hatch["envs"]["pkg"]
    short = {name: name.removeprefix("xoron-") for name in members}
    assert pkg["workspace"]["members"] == ["packages/xoron-{matrix:package}"]
    rows = pkg["overrides"]["matrix"]["package"]["workspace"]["members"]
    for name in members:
        given = {row["value"].removeprefix("packages/") for row in rows if short[name] in row["if"]}
        assert given == siblings(members, name), name
    for environment in ("pkg", "wheel"):
        assert hatch["envs"][environment]["matrix"] == [{"package": sorted(short.values())}]


def test_every_tool_knows_every_package(hatch, tools, members) -> None:
    sources = {f"packages/{name}/src" for name in members}
    assert set(tools["mypy"]["mypy_path"].split(":")) == sources
    path = hatch["envs"]["lint"]["env-vars"]["PYTHONPATH"]
    assert {entry.removeprefix("{root}/") for entry in path.split("{;}")} == sources
    linter = tools["importlinter"]
    assert set(linter["root_packages"]) == {member.package for member in members.values()}
    install = hatch["envs"]["wheel"]["scripts"]["install"]
    assert set(re.findall(r"--reinstall-package (\S+)", install)) == set(members)


def test_the_layers_allow_what_is_declared_and_nothing_else(tools, members) -> None:
    layers = next(c for c in tools["importlinter"]["contracts"] if c["type"] == "layers")["layers"]
    rank = {name.strip(): index for index, row in enumerate(layers) for name in row.split("|")}
    assert set(rank) == {member.package for member in members.values()}
    for member in members.values():
        for other in member.dependencies & set(members):
            assert rank[members[other].package] > rank[member.package], (member.name, other)


def test_one_version_for_all(root, members) -> None:
    version = (root / "VERSION").read_text(encoding="utf-8").strip()
    series = Version(version)
    for member in members.values():
        assert "version" in member.project["dynamic"], member.name
        assert importlib.metadata.version(member.name) == version, member.name
        for text in member.project["dependencies"]:
            requirement = Requirement(text)
            if requirement.name in members:
                assert str(requirement.specifier) == f"=={series.major}.{series.minor}.*"


def test_the_environment_has_no_torchvision_and_no_torchaudio() -> None:
    present = [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name)]
    assert not present, "their wheels for Linux are CUDA builds and break beside a CPU torch"


@pytest.mark.skipif("CI" not in os.environ, reason="a developer's machine may have a CUDA torch")
def test_torch_is_the_cpu_build() -> None:
    import torch

    assert torch.version.cuda is None


def test_the_plug_in_surface_imports_nothing_heavy() -> None:
    modules = ("xoron_core", "xoron_core.descriptors", "xoron_core.errors")
    modules += ("xoron_core.hookspecs", "xoron_core.plugins", "xoron_core.cli")
    modules += ("xoron_core.plugin", "xoron_llm.plugin", "xoron_train.plugin")
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'typer', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {sorted(heavy)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Written in pieces, so that this file does not name what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/" + r"(?:home|root|Users|opt|work|mnt|tmp)/[\w.-]+")
CUDA_PIN = re.compile(r"\+" + r"cu\d{2}|nvidia-[a-z]+-" + r"cu\d{2}|whl/" + r"cu\d{2}")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see /" + "home/me/x", True),
        ("'/" + "tmp/out'", True),
        ("torch==2.13.0+" + "cu126", True),
        ("https://example.org/home/me", False),
        ("a/work/b and .ci/run", False),
        ("torch==2.13.0", False),
    ],
)
def test_the_patterns_tell_machine_paths_and_cuda_pins(text: str, wrong: bool) -> None:
    assert bool(MACHINE_PATH.search(text) or CUDA_PIN.search(text)) is wrong


def test_no_file_names_a_machine_path_or_a_cuda_build(root) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    problems, count = [], 0
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # binary data, or deleted in the working tree
        count += 1
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or CUDA_PIN.search(line):
                problems.append(f"{name}:{number}: {line.strip()[:80]}")
    assert count > 20
    assert not problems, "\n".join(problems)
