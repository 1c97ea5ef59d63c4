"""Proves how the kit runs: a plug-in is found by name, module, folder or file and leaves no trace;
expected failures are strict; what hangs, crashes or exits fails by name and the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from xoron_core.cli import run
from xoron_core.errors import UsageError
from xoron_core.testing import CheckFailed, CheckSkipped, checks_for, run_checks
from xoron_core.testing.run import parametrize_with_checks

LOOP = ("return Features(self.embed(dots), mask)", "while True:\n            dots = dots + 1")
FORWARD = "return Features(self.embed(dots), mask)"
# One call that no signal interrupts.
C_LOOP = (FORWARD, "return sum(range(10**12))")
CRASH = (FORWARD, "import os\n        os._exit(9)")
SWALLOWS = (
    FORWARD,
    "while True:\n            try:\n                dots = dots + 1\n"
    "            except Exception:\n                pass",
)


def statuses(report):
    return {result.id: result.status for result in report.results}


def test_a_correct_plugin_passes_and_is_not_left_on_the_path(dots):
    before = list(sys.path)
    report = run_checks(str(dots("dots_ok")), isolated=False)
    assert report.ok, report.table()
    assert report.counts["passed"] >= 20
    assert sys.path == before


@pytest.mark.parametrize("layout", ["pyproject", "installed", "file"])
def test_source_is_found_in_every_layout(dots, tmp_path, layout):
    name = f"dots_{layout}"
    place = dots(name)
    if layout == "pyproject":
        project = f'[project]\nname = "xoron-{name}"\nversion = "2.1"\n'
        project += f'[project.entry-points.xoron]\npoints = "{name}"\n'
        (tmp_path / "pyproject.toml").write_text(project)
        place = tmp_path
    elif layout == "installed":
        info = tmp_path / f"{name}-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: xoron-{name}\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text(f"[xoron]\npoints = {name}\n")
        place = tmp_path
    report = run_checks(str(place), only="references", isolated=False)
    named = (name, "not installed") if layout == "file" else ("points", f"xoron-{name}")
    assert (report.plugin, report.distribution) == named
    assert statuses(report) == {"encoder/dots/references": "passed"}


def test_an_installed_plugin_is_found_by_name_and_by_module():
    by_name = run_checks("core", only="token-groups", isolated=False)
    by_module = run_checks("xoron_core.plugin", only="plugin/token-groups", isolated=False)
    assert statuses(by_name) == statuses(by_module) == {"plugin/token-groups": "passed"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("coer", "Did you mean 'core'"),
        ("no/such/file.py", "no such file"),
        ("no_such_module.plugin", "no module and no path"),
    ],
)
def test_what_is_not_there_is_named(given, words):
    with pytest.raises(UsageError, match=words):
        checks_for(given)


def test_a_folder_without_a_plugin_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"project.entry-points.xoron"):
        checks_for(str(tmp_path))


def test_needs_skip_what_means_nothing_after_a_failure(dots):
    path = dots("dots_broken", parts=(FORWARD, "raise ValueError('no dots')"))
    report = run_checks(str(path), only="encoder/dots", isolated=False)
    failed = [result for result in report.results if result.status == "failed"]
    assert [result.id for result in failed] == ["encoder/dots/runs"]
    assert "ValueError: no dots (in forward, dots_broken_parts.py:" in failed[0].message
    skipped = [r.message for r in report.results if r.status == "skipped"]
    assert sum("needs 'runs'" in message for message in skipped) >= 8


def test_a_check_answers_the_same_when_it_is_called_again(dots):
    path = dots("dots_again", parts=(FORWARD, "raise ValueError('no dots')"))
    bound = {check.check.id: check for check in checks_for(str(path))}
    with pytest.raises(CheckSkipped, match="needs 'runs'"):
        bound["gradients"]()
    for _ in range(2):
        with pytest.raises(CheckFailed, match="no dots"):
            bound["runs"]()


def test_expected_failures_are_strict(dots):
    path = str(dots("dots_expected", parts=("config.width\n        self.e", "5\n        self.e")))
    options = {"isolated": False, "only": "encoder/dots"}
    assert not run_checks(path, **options).ok
    report = run_checks(path, expected_failures={"declared-widths": "to come"}, **options)
    assert report.ok
    expected = statuses(report)["encoder/dots/declared-widths"]
    assert expected == "expected"
    both = {"declared-widths": "to come", "encoder/dots/gradients": "never"}
    report = run_checks(path, expected_failures=both, **options)
    assert statuses(report)["encoder/dots/gradients"] == "failed"
    assert "remove it from expected_failures" in report.table()
    with pytest.raises(UsageError, match="Did you mean 'gradients'"):
        parametrize_with_checks(path, expected_failures={"gradient": "x"})


def test_pytest_runs_skips_and_expects_as_the_report_does(dots, tmp_path):
    path = dots("dots_pytest", parts=("config.width\n        self.e", "5\n        self.e"))
    (tmp_path / "test_it.py").write_text(
        "from xoron_core.testing import parametrize_with_checks\n"
        f"@parametrize_with_checks({str(path)!r}, expected_failures="
        "{'declared-widths': 'later', 'determinism': 'wrong'})\n"
        "def test_conformance(check):\n    check()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    command += ["-k", "encoder or presets"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 failed" in out, out
    assert "test_conformance[encoder/dots/determinism]" in out
    assert "1 xfailed" in out
    assert "skipped" in out


def test_what_runs_too_long_fails_by_name_and_the_rest_goes_on(dots):
    path = str(dots("dots_loop", parts=LOOP))
    report = run_checks(path, time_limit=2, only="encoder/dots", isolated=False)
    failed = {r.id: r.message for r in report.results if r.status == "failed"}
    assert list(failed) == ["encoder/dots/runs"]
    assert (
        "longer than its limit of 2 s (in forward, dots_loop_parts.py:"
        in failed["encoder/dots/runs"]
    )
    after = statuses(report)
    assert after["encoder/dots/processor"] == "passed"
    assert after["encoder/dots/gradients"] == "skipped"


def test_a_plugin_that_swallows_exceptions_cannot_swallow_the_limit(dots):
    path = dots("dots_swallow", parts=SWALLOWS)
    report = run_checks(str(path), time_limit=2, only="runs", isolated=False)
    assert "longer than its limit" in report.results[0].message


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [("stuck", C_LOOP, "was killed"), ("crash", CRASH, "ended the process (exit code 9)")],
)
def test_a_process_of_its_own_survives_what_kills_one(dots, monkeypatch, name, fault, words):
    monkeypatch.setattr("xoron_core.testing.isolated.GRACE_SECONDS", 1.0)
    path = dots(f"dots_{name}", parts=fault)
    report = run_checks(str(path), time_limit=2, only="encoder/dots")
    failed = {r.id: r.message for r in report.results if r.status == "failed"}
    assert list(failed) == ["encoder/dots/runs"], report.table()
    assert words in failed["encoder/dots/runs"]
    after = statuses(report)
    assert after["encoder/dots/processor"] == "passed"
    assert after["encoder/dots/gradients"] == "skipped"


def test_the_command_prints_a_table_or_json_and_says_by_its_code_what_came(dots, capsys):
    good = dots("dots_cli")
    assert run(["plugins", "check", str(good), "--only", "references"]) == 0
    out = capsys.readouterr().out
    assert "passed" in out
    assert "encoder/dots/references" in out
    bad = dots("dots_cli_bad", plugin=("xoron_api = 1", "xoron_api = 7"))
    assert run(["plugins", "check", str(bad), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in data["results"]] == ["plugin/loads"]
    assert "pip install --upgrade xoron-core" in data["results"][0]["message"]
    for wrong in (["nope"], [str(good), "--only", "gradient"], [str(good), "--time-limit", "0"]):
        assert run(["plugins", "check", *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
