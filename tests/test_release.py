"""Proves that the release checks find what they are for, that every package is in every list of
them, and that the workflow for a public host runs what `.ci/run` runs."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = script("check_release")
environment = script("check_environment")


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def commands(workflow, job=None):
    jobs = [workflow["jobs"][job]] if job else workflow["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def short(members):
    return sorted(name.removeprefix("xoron-") for name in members)


def test_packages_are_installed_after_what_they_depend_on(members):
    needs = release.dependencies(ROOT)
    assert set(needs) == set(members)
    order = release.in_order(needs)
    assert order[0] == "xoron-core"
    assert sorted(order) == sorted(members)
    for name, wanted in needs.items():
        assert all(order.index(other) < order.index(name) for other in wanted)


def test_an_order_is_found_or_a_circle_named():
    needs = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert release.in_order(needs) == ["c", "b", "a", "d"]
    with pytest.raises(ValueError, match="circle"):
        release.in_order({"a": {"b"}, "b": {"a"}, "c": set()})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# X\n\n## 1.2.0\n\n- New.\n", ""),
        ("# X\n\n## 1.2.0, unreleased\n\n- New.\n\n## 1.1.0\n", ""),
        ("# X\n\n## 1.2.0, 2026-11-21\n\n- New.\n", ""),
        ("# X\n\n## 1.2.0rc1\n\n- New.\n", "begins with '1.2.0rc1'"),
        ("# X\n\n## Unreleased\n\n- New.\n", "begins with 'Unreleased'"),
        ("# X\n\n## 1.2.0\n\n## 1.1.0\n\n- Old.\n", "says nothing"),
        ("# X\n", "has no section"),
    ],
)
def test_a_changelog_is_about_the_version(text, problem):
    found = release.changelog_problem(text, "1.2.0")
    assert found.startswith(problem) if problem else found == ""


def test_every_changelog_is_about_the_version_of_all(members):
    version = (ROOT / "VERSION").read_text().strip()
    for member in members.values():
        text = (member.folder / "CHANGELOG.md").read_text(encoding="utf-8")
        assert release.changelog_problem(text, version) == "", member.name


def test_what_is_missing_in_dist_is_named(tmp_path, members):
    for member in members.values():
        folder = tmp_path / "packages" / member.name
        folder.mkdir(parents=True)
        for name in ("pyproject.toml", "CHANGELOG.md"):
            (folder / name).write_bytes((member.folder / name).read_bytes())
    version = (ROOT / "VERSION").read_text().strip()
    (tmp_path / "VERSION").write_text(f"{version}\n")
    (tmp_path / "dist").mkdir()
    for member in members.values():
        for suffix in ("-py3-none-any.whl", ".tar.gz"):
            (tmp_path / "dist" / f"{member.package}-{version}{suffix}").touch()
    assert release.problems(tmp_path) == []
    (tmp_path / "dist" / f"xoron_core-{version}.tar.gz").unlink()
    (tmp_path / "VERSION").write_text("9.9.9\n")
    found = release.problems(tmp_path)
    assert "dist/xoron_core-9.9.9.tar.gz is missing; run: hatch build --all" in found
    assert any("CHANGELOG.md begins with" in line for line in found)


def test_a_version_is_written_in_one_place_only(members):
    version = (ROOT / "VERSION").read_text().strip()
    for member in members.values():
        project = (member.folder / "pyproject.toml").read_text(encoding="utf-8")
        assert 'path = "../../VERSION"' in project
        for source in [project, *(p.read_text("utf-8") for p in member.source.rglob("*.py"))]:
            assert not re.search(rf"version.*['\"]{re.escape(version)}['\"]", source), member.name


def test_every_package_is_in_the_lowest_environment(hatch, members):
    (line,) = [s for s in hatch["envs"]["lowest"]["scripts"]["install"] if "lowest-direct" in s]
    listed = {name.partition("[")[0] for name in re.findall(r"-e packages/(\S+)", line)}
    assert listed == set(members)
    for text in hatch["envs"]["default"]["dependencies"]:
        if text.startswith(("hypothesis", "peft", "pytest", "tiktoken")):
            assert f"'{text}'" in line, "the tests need the same tools in both environments"


def test_a_bound_that_cannot_be_installed_is_found(monkeypatch):
    versions = {"a": "1.5.2", "b": "2.0.1", "torch": "9.0"}
    monkeypatch.setattr(environment.importlib.metadata, "version", versions.__getitem__)
    for requires, wrong in (
        (["a>=1.5", "b>=2", "torch>=2.11", 'a>=1; extra == "x"', "b==2.*"], 0),
        (["a>=1.4"], 1),
        (["b>=1"], 1),
    ):
        monkeypatch.setattr(
            environment.importlib.metadata, "requires", lambda _, found=requires: found
        )
        assert len(environment.above_the_lowest(["x"])) == wrong, requires


def test_the_workflow_has_a_job_for_each_package(workflow, members):
    assert workflow["jobs"]["package"]["strategy"]["matrix"]["package"] == short(members)
    of_one = commands(workflow, "package")
    assert "hatch run pkg.${{ matrix.package }}:test" in of_one
    assert "hatch run wheel.${{ matrix.package }}:test" in of_one


def test_the_workflow_runs_what_our_own_ci_runs(workflow):
    own = re.findall(r"hatch (?:run|build) [^|)\n]+", (ROOT / ".ci/run").read_text())
    theirs = {re.sub(r"\.\$\{\{ matrix\.package \}\}", "", line) for line in commands(workflow)}
    # Benchmarks say nothing on a shared host.
    missing = {line.strip() for line in own if " bench " not in line} - theirs
    assert missing == set()
    assert len(own) > 8


def test_commands_of_the_workflow_exist(workflow, hatch):
    for line in commands(workflow):
        if match := re.fullmatch(r"hatch run ([\w-]+)(?:\.[^:]+)?:([\w-]+)", line):
            assert match[2] in hatch["envs"][match[1]]["scripts"], line


def test_the_stages_are_a_valid_script():
    done = subprocess.run(["bash", "-n", ROOT / ".ci/run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
