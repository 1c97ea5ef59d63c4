"""Proves that the light path stays light: no torch, pydantic or typer, little CPU time."""

import json
import os
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "pydantic", "typer", "numpy", "yaml")


@pytest.mark.parametrize(
    "code",
    ["import xoron_core", "from xoron_core.cli import run; assert run(['plugins', 'list']) == 0"],
)
def test_nothing_heavy_is_imported(code):
    probe = (
        f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


def test_plugins_list_takes_less_than_300_ms_of_cpu_on_a_second_run():
    command = [sys.executable, "-c", "from xoron_core.cli import main; main(['plugins', 'list'])"]
    seconds = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=dict(os.environ))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds[1:]) < 0.3, seconds
