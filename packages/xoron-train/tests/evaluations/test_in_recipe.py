"""Proves that a recipe's evaluations run with what it says, and that its gates decide the run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from xoron_core.api import save
from xoron_core.errors import XoronError
from xoron_train.recipe import Recipe
from xoron_train.run import train


@pytest.fixture
def recipe(tmp_path, shows):
    """A recipe of one step that hardly moves the weights."""
    rows = [
        {"messages": list(shows(first + second).messages)}
        for first in "ABCDEFGH"
        for second in "XYZ"
    ]
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def make(**evaluations):
        return Recipe.parse(
            {
                "name": "words",
                "mixture": {"words": {"kind": "conversations", "path": str(file)}},
                "eval_fraction": 0.4,
                "sequence_length": 64,
                "batch_size": 2,
                "max_steps": 1,
                "learning_rate": 1e-9,
                "tensorboard": False,
                "evaluations": evaluations,
            }
        )

    return make


def test_both_are_asked_about_what_is_held_out(recipe, speller, tmp_path):
    save(*speller(), tmp_path / "model")
    evaluations = {
        "sees": {"use": "seeing", "source": "words", "required": True},
        "says": {"use": "answers", "source": "words", "at_least": 0.9, "control_at_most": 0.1},
    }
    result = train(recipe(**evaluations), tmp_path / "run", model=tmp_path / "model")
    found = result.evaluation["evaluations"]
    assert found["sees"]["passed"] is True
    assert found["sees"]["shuffled"]["delta"] > 1
    assert found["says"]["passed"] is True
    assert found["says"]["samples"] == found["sees"]["samples"] >= 2
    *_, last = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(last)["evaluations"] == found


def test_a_blind_model_fails_a_required_evaluation(recipe, speller, tmp_path):
    save(*speller(gain=0), tmp_path / "model")
    blind = recipe(sees={"use": "seeing", "source": "words", "required": True})
    with pytest.raises(XoronError, match=r"sees.*\"wins\": 0\.5"):
        train(blind, tmp_path / "run", model=tmp_path / "model")
    assert (tmp_path / "run/model/config.json").is_file()


def test_configs_are_read_without_torch():
    code = (
        "import sys, xoron_train.evaluations, xoron_train.evaluations.config;"
        " sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
