"""Proves that two processes train as one does with the same rows per optimizer step, that what is
learned outside the gradient comes of what both saw, and that a run may change its number of
processes on the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xoron_train import train
from xoron_train.metrics import read_metrics
from xoron_train.recipe import Recipe

# The command line, refusing to end the process group while something of DDP's could still free it.
_MAIN = """
import gc
import torch.distributed as dist
from xoron_core.cli import main

def destroy(group=None, *, real=dist.destroy_process_group):
    left = [o for o in gc.get_objects() if type(o).__name__ == "DistributedDataParallel"]
    assert not left, "the model outlives its process group: this can hang"
    print("process group ends")
    real(group)

dist.destroy_process_group = destroy
main()
"""
_CHANGES = {"max_steps": 8, "save_every": 4, "eval_every": 4, "batch_size": 3}


@pytest.mark.slow
def test_two_processes_equal_one(
    recipe_file: Callable[..., Path],
    new_recipe: Callable[..., Recipe],
    new_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = new_model(dropout=0.0, num_experts=4)
    recipe = recipe_file(**_CHANGES, gradient_accumulation_steps=2)
    two = tmp_path / "two"
    script = tmp_path / "main.py"
    script.write_text(_MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["train", str(recipe), "--model", str(model), "-o", str(two)]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("process group ends") == 2
    assert done.stdout.count("held-out bits per byte") == 1  # one process speaks for all
    one = tmp_path / "one"
    alone = new_recipe(**_CHANGES, gradient_accumulation_steps=4)
    train(alone, one, model=model, quiet=True)
    _same(two, one)
    bias, expected = (_selection_bias(run, step=4) for run in (two, one))
    assert expected.unique().numel() > 1
    torch.testing.assert_close(bias, expected)
    # Cut back to the checkpoint that two processes wrote, and go on with one.
    shutil.rmtree(two / "checkpoints/step-00000008")
    train(alone, two, resume=True, quiet=True)
    _same(two, one)


def _same(run: Path, other: Path) -> None:
    pairs = list(
        zip(read_metrics(run / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True)
    )
    assert len(pairs) == 10
    for record, expected in pairs:
        assert (record["kind"], record["step"]) == (expected["kind"], expected["step"])
        assert record["tokens"] == expected["tokens"]
        for key in ("loss", "bits_per_byte"):
            assert record[key] == pytest.approx(expected[key], abs=1e-5)
        if record["kind"] == "train":
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert record["parts"] == pytest.approx(expected["parts"], rel=1e-4)
            assert record["parts"]["backbone/dropped"] == 0


def _selection_bias(run: Path, *, step: int) -> torch.Tensor:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = [load_file(path) for path in folder.rglob("backbone-*.safetensors")]
    return next(t for file in files for name, t in file.items() if "selection_bias" in name)
