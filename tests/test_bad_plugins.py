"""Proves that a bad plug-in harms nobody else: whatever it does, it is named with its distribution
by `xoron plugins list`, and composing with the sound ones goes on. Each is a real distribution on
the path of a real process.

That a plug-in which hangs is stopped is proved where its time limit is, in `xoron plugins check`.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.distributions import GOOD, install

GROUP = """
from xoron_core.descriptors import TokenGroup
from xoron_core.hookspecs import hookimpl
xoron_api = 1
@hookimpl
def xoron_token_groups():
    return [TokenGroup("xoron-NAME/marks", {"mark": MARK})]
"""
# What it is called, its source, its state, and words of its problem.
BAD = [
    ("raises", "raise RuntimeError('not today')", "broken", ["RuntimeError: not today"]),
    ("exits", "import sys; sys.exit(7)", "broken", ["SystemExit: 7"]),
    ("leaves", "raise KeyError('x')", "broken", ["KeyError"]),
    ("lacks", "import a_module_nobody_has", "broken", ["a_module_nobody_has"]),
    ("syntax", "def broken(:", "broken", ["SyntaxError"]),
    ("silent", "x = 1", "incompatible", ["xoron_api = 1"]),
    ("future", "xoron_api = 7", "incompatible", ["API 7", "pip install --upgrade xoron-core"]),
    ("twice", GOOD.replace("return [", "return 2 * ["), "broken", ["encoder/twice", "twice"]),
    ("kinds", GOOD.replace('"encoder"', '"encodr"'), "broken", ["'encodr'", "'encoder'"]),
    ("hookless", GOOD.replace("def xoron_components", "def xoron_component"), "broken",
     ["unknown hook 'xoron_component'", "'xoron_components'"]),
    ("hooks", GOOD.replace("return [", "1 / 0; return ["), "broken", ["ZeroDivisionError"]),
    ("hookexits", GOOD.replace("return [", "import sys; sys.exit(3); return ["), "broken",
     ["SystemExit: 3"]),
    ("types", GOOD.replace("return [", "return [3, "), "broken", ["returned 3", "Component"]),
    ("overlap", GROUP.replace("MARK", "'<|user|>'"), "conflict",
     ["<|user|>", "xoron-core", "--plugins -overlap"]),
    ("squats", GOOD.replace('"encoder", name="NAME"', '"backbone", name="xoron-moe"'), "conflict",
     ["backbone/xoron-moe", "xoron-llm", "--plugins -squats"]),
]  # fmt: skip


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def xoron(site, *arguments):
    """Runs the command in a process of its own, with the site on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", "from xoron_core.cli import main; main()", *arguments],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip


def listed(site):
    done = xoron(site, "plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return {plugin["name"]: plugin for plugin in json.loads(done.stdout)}


@pytest.mark.parametrize(("name", "source", "state", "words"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_plug_in_is_named_with_its_distribution_and_its_fault(
    site, name, source, state, words
):
    install(site, name, source, version="4.5")
    install(site, "sound")
    found = listed(site)
    bad = found[name]
    assert (bad["state"], bad["distribution"], bad["version"]) == (state, f"xoron-{name}", "4.5")
    assert all(word in bad["problem"] for word in words), bad["problem"]
    assert found["sound"]["state"] == found["core"]["state"] == "available"


def test_all_of_them_at_once_leave_the_rest_working(site, tmp_path):
    for name, source, _, _ in BAD:
        install(site, name, source)
    install(site, "sound")
    found = listed(site)
    expected = {name: state for name, _, state, _ in BAD}
    assert {name: found[name]["state"] for name in expected} == expected
    assert found["sound"]["state"] == "available"
    text = xoron(site, "plugins", "list")
    assert all(f"\n{name}: " in text.stdout for name in expected)
    off = ",".join(f"-{name}" for name in ("squats", "overlap"))
    done = xoron(
        site, "compose", "--plugins", off, "--preset", "tiny", "--set", "backbone.num_layers=2",
        "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_using_a_bad_plug_in_says_why_it_cannot_be_used(site):
    install(site, "raises", BAD[0][1])
    done = xoron(site, "compose", "--plugins", "raises", "--dry-run")
    assert done.returncode == 2
    assert "xoron-raises" in done.stderr
    assert "not today" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plug_in_that_prints_does_not_spoil_the_output(site):
    install(site, "prints", "print('hello from a plug-in')\n" + GOOD)
    assert listed(site)["prints"]["state"] == "available"
