"""Proves that a third party's plug-in needs no change of ours: the wheel of the example passes its
tests, the conformance kit and a forecast that beats the last value among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "xoron-timeseries"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The example's wheel, unpacked as an installer does it."""
    folder = tmp_path_factory.mktemp("timeseries")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=EXAMPLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_tests(site: Path, *options: str) -> str:
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=site,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_shorter_than_200_lines():
    files = (EXAMPLE / "src").rglob("*.py")
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) < 200


def test_its_parts_and_the_kit_pass(site):
    assert "passed" in run_tests(site, str(EXAMPLE / "tests"), "-k", "not forecasts")


@pytest.mark.slow
def test_it_forecasts_better_than_the_last_value(site, capsys):
    out = run_tests(site, str(EXAMPLE / "tests" / "test_forecast.py"))
    with capsys.disabled():
        print(out)
