"""Proves exact resume: a run killed with SIGKILL at random moments, twice, and resumed gives the
same losses, evaluations and weights, bit for bit, as one that was never interrupted. Dropout is
on, so the random generators take part."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xoron_core.api import load
from xoron_train.metrics import read_metrics

_STEPS = 60
_TIMES = ("tokens_per_second", "elapsed_seconds")


def start(recipe: Path, model: Path, run: Path) -> subprocess.Popen[bytes]:
    command = ["train", str(recipe), "--model", str(model), "-o", str(run), "--resume"]
    code = f"from xoron_core.cli import main; main({command!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def kill_after(process: subprocess.Popen[bytes], run: Path, step: int, delay: float) -> None:
    """Kills once a record of `step` stands, and a moment later than that."""
    deadline = time.monotonic() + 90
    while not any(record["step"] >= step for record in read_metrics(run / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"


def records(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl")
    return [{key: record[key] for key in record if key not in _TIMES} for record in found]


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_never_interrupted(
    recipe_file: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    seed = time.time_ns() % 10_000
    chance = random.Random(seed)  # noqa: S311 - no secret
    # A save takes longer than a step, so many of the kills fall into one.
    recipe = recipe_file(
        max_steps=_STEPS,
        sequence_length=128,
        batch_size=4,
        gradient_accumulation_steps=2,
        save_every=3,
        eval_every=10,
    )
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    uninterrupted = start(recipe, model_folder, straight)  # beside, to save time
    for step in (chance.randrange(4, 20), chance.randrange(24, 44)):
        process = start(recipe, model_folder, broken)
        kill_after(process, broken, step, chance.uniform(0.0, 0.1))
    finish(start(recipe, model_folder, broken))
    finish(uninterrupted)
    expected = records(straight)
    assert [r["step"] for r in expected if r["kind"] == "train"] == list(range(1, _STEPS + 1))
    assert expected[0]["loss"] > expected[-2]["loss"] > 0
    assert records(broken) == expected, f"seed {seed}"
    weights = load(straight / "model")[0].state_dict()
    for name, tensor in load(broken / "model")[0].state_dict().items():
        assert torch.equal(tensor, weights[name]), f"{name}, seed {seed}"
