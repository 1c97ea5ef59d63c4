"""Proves that a composed model learns: its forecasts of held-out years beat the last value."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("xoron_llm", reason="text needs xoron-llm")


def test_forecasts_beat_the_last_value(tmp_path, capsys):
    path = Path(__file__).parents[1] / "forecast.py"
    errors = runpy.run_path(str(path))["main"](["--out", str(tmp_path / "model")])
    with capsys.disabled():
        print(f"\nerror in degrees: {errors}")
    assert errors["model"] < 0.75 * errors["last value"]
    assert (tmp_path / "model" / "config.json").is_file()
