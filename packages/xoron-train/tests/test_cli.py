"""Proves that a user's mistake is one message with exit code 1 or 2 and no traceback, and that
results alone go to standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from xoron_core.cli import run as xoron


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `xoron train` that must fail; returns its message."""

    def call(*arguments: str, code: int) -> str:
        assert xoron(["train", *arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert captured.err.splitlines()[-1:] != []
        return captured.err

    return call


def test_an_unknown_recipe_is_answered_with_the_closest(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    message = fails("text-tinny", "--model", "m", "-o", str(tmp_path / "r"), code=2)
    assert "unknown recipe 'text-tinny'. Did you mean 'text-tiny'?" in message
    missing = fails(str(tmp_path / "no.yaml"), "--model", "m", "-o", "r", code=2)
    assert "no.yaml: cannot be read (No such file or directory)" in missing


def test_a_wrong_key_is_named_with_its_line_and_the_right_one(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nmax_steps: 3\nlearning_rte: 0.1\n"
        "mixture:\n  a:\n    kind: files\n    path: .\n    patern: '*'\n"
    )
    message = fails(str(path), "--model", "m", "-o", str(tmp_path / "run"), code=2)
    assert f"{path}:3: unknown key 'learning_rte'. Did you mean 'learning_rate'?" in message
    assert f"{path}:8: unknown key 'mixture.a.patern'. Did you mean 'pattern'?" in message
    override = fails("text-tiny", "--set", "max_steps=x", "--model", "m", "-o", "r", code=2)
    assert "'max_steps'" in override
    foreign = fails("text-tiny", "--set", "mixture.stdlib.field=x", "-o", "r", code=2)
    assert "a source of kind 'files' takes no field" in foreign


def test_a_missing_model_and_empty_data_are_said(
    fails: Callable[..., str],
    recipe_file: Callable[..., Path],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    run = str(tmp_path / "run")
    absent = str(tmp_path / "absent")
    assert "there is no such folder" in fails(
        str(recipe_file()), "--model", absent, "-o", run, code=1
    )
    (tmp_path / "void").mkdir()
    assert "is not a model folder" in fails(
        str(recipe_file()), "--model", str(tmp_path / "void"), "-o", run, code=1
    )
    recipe = recipe_file(mixture={"none": {"kind": "files", "path": str(tmp_path / "void")}})
    assert "mixture.none: no file below" in fails(
        str(recipe), "--model", str(model_folder), "-o", run, code=1
    )
    assert not Path(run).exists()


def test_the_result_alone_is_on_standard_output(
    recipe_file: Callable[..., Path],
    model_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    arguments = [str(recipe_file()), "--model", str(model_folder), "-o", str(run)]
    assert xoron(["train", *arguments, "--json"]) == 0
    captured = capfd.readouterr()
    shown = json.loads(captured.out)
    assert shown["model"] == str(run / "model")
    assert shown["steps"] == 6
    assert shown["evaluation"]["bits_per_byte"] > 0
    assert "step 6 of 6: loss" in captured.err
    assert xoron(["-q", "train", *arguments, "--resume"]) == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines()[0] == f"model: {run / 'model'}"
    assert "step 6 of 6" not in captured.err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert xoron(["train", "--help"]) == 0
    assert "Example: xoron train text-tiny --model" in " ".join(capsys.readouterr().out.split())
