"""What tests of training share: a run's records and weights, and a run of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import xoron_core
from xoron_train.metrics import read_metrics

# Of a record, what depends on the machine.
_TIMES = ("tokens_per_second", "items_per_second", "elapsed_seconds")


def records(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without times."""
    return [
        {key: record[key] for key in record if key not in _TIMES}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of a model folder."""
    return xoron_core.load(folder)[0].state_dict()


def train_in_two_processes(recipe: Any, run: Path, *, model: Path) -> None:
    """`xoron train` under torch's own launcher, one thread each."""
    script, written = run.with_suffix(".py"), run.with_suffix(".yaml")
    script.write_text("from xoron_core.cli import main\nmain()\n")
    written.write_text(yaml.safe_dump(recipe.data()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["train", str(written), "--model", str(model), "-o", str(run)]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
