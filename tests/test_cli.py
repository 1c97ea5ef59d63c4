"""Proves the command line: its surface is frozen, its jobs work on a real folder, and every mistake
of a user is one message with exit code 1 or 2 and no traceback."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import xoron_core
from xoron_core.cli import run
from xoron_core.cli.app import app

SURFACE = Path(__file__).parent / "data" / "cli_surface.json"


def surface(command, name="xoron"):
    """Every command with its options and arguments, as plain data."""
    found = {
        name: sorted(
            "/".join(parameter.opts) if parameter.param_type_name == "option" else parameter.name
            for parameter in command.params
            if parameter.name != "help"
        )
    }
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for sub in command.list_commands(context):
            found |= surface(command.get_command(context, sub), f"{name} {sub}")
    return found


def test_the_surface_is_frozen():
    """To change it on purpose, change `data/cli_surface.json` and say so in the changelog."""
    assert surface(typer.main.get_command(app)) == json.loads(SURFACE.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny"
    assert run(["-q", "compose", "--plugins", "llm", "--preset", "tiny", "-o", str(path),
                "--set", "backbone.num_layers=2", "--seed", "3"]) == 0  # fmt: skip
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def call(capsys, *arguments, code=0):
    """Runs a command; returns output and errors, and checks that a mistake is one message."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code:
        assert err.strip(), "a failure says why"
    return out, err


def test_every_command_has_help_with_an_example(capsys):
    for command in surface(typer.main.get_command(app)):
        arguments = [*command.split()[1:], "--help"]
        out, _ = call(capsys, *arguments)
        assert "Example: xoron" in out, command


def test_the_documented_command_line_is_the_real_one():
    script = Path(__file__).parents[1] / "docs" / "generate.py"
    out = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_compose_writes_what_python_composes(folder):
    model, _ = xoron_core.load(folder)
    same, _ = xoron_core.compose(
        plugins="llm", preset="tiny", overrides=["backbone.num_layers=2"], seed=3
    )
    for (name, ours), theirs in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dry_run_and_inspect_agree_and_are_exact(folder, capsys, tmp_path):
    planned = json.loads(
        call(capsys, "compose", "--plugins", "llm", "--preset", "tiny", "--set",
             "backbone.num_layers=2", "--dry-run", "--json")[0]
    )  # fmt: skip
    shown = json.loads(call(capsys, "inspect", folder, "--json")[0])
    model, _ = xoron_core.load(folder)
    assert planned["parameters"] == shown["parameters"]
    assert shown["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert shown["parameters"]["active"] < shown["parameters"]["total"]
    assert shown["token_space"] == planned["token_space"]
    assert shown["lock"]["plugins"] == {"xoron-llm": xoron_core.__version__}
    text, _ = call(capsys, "inspect", folder)
    assert f"{shown['parameters']['total']:,}" in text
    assert shown["token_space"]["hash"] in text
    assert list(tmp_path.iterdir()) == []


def test_cache_bytes_per_token_are_what_the_cache_holds(folder, capsys):
    model, _ = xoron_core.load(folder)
    cache = model(input_ids=torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    shown = json.loads(call(capsys, "inspect", folder, "--json")[0])
    assert shown["cache_bytes_per_token"] == held / 10


def test_generate_is_repeatable_and_prints_json(folder, capsys):
    ask = ["generate", folder, "x = ", "--max-new-tokens", 12, "--temperature", 1, "--seed", 5]
    text, _ = call(capsys, *ask, "--raw")
    data = json.loads(call(capsys, *ask, "--raw", "--json")[0])
    assert data["text"] == text.removesuffix("\n")
    assert data["tokens"] <= 12
    chat = json.loads(call(capsys, *ask, "--json")[0])
    assert chat["text"] != data["text"]


def test_schema_completes_what_the_config_takes(capsys):
    schema = json.loads(call(capsys, "schema", "backbone/xoron-moe")[0])
    assert schema["properties"]["num_layers"]["type"] == "integer"
    assert schema["additionalProperties"] is False
    assert "slots" in json.loads(call(capsys, "schema", "composition")[0])["properties"]


def test_tokens_show_and_verify(folder, capsys, copy):
    model, _ = xoron_core.load(folder)
    assert model.space.hash in call(capsys, "tokens", "show", folder, "--specials")[0]
    assert json.loads(call(capsys, "tokens", "verify", folder)[0])["hash"] == model.space.hash
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    bos = tokenizer["model"]["vocab"].pop("<|bos|>")
    tokenizer["model"]["vocab"]["<|bos|>"] = bos + 900
    for added in tokenizer["added_tokens"]:
        if added["content"] == "<|bos|>":
            added["id"] = bos + 900
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, err = call(capsys, "tokens", "verify", copy, code=1)
    assert "<|bos|>" in err
    assert str(bos) in err


def test_plugins_show_and_list(capsys):
    listed = json.loads(call(capsys, "plugins", "list", "--json")[0])
    assert {p["name"]: p["state"] for p in listed} == {
        "audio": "available", "core": "available", "llm": "available", "train": "available",
        "vision": "available",
    }  # fmt: skip
    assert "backbone/xoron-moe" in call(capsys, "plugins", "show", "llm")[0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plugins", "show", "lm"], 2, ["Did you mean 'llm'"]),
        (["plugins", "show", "video"], 2, ["pip install xoron-video"]),
        (["compose", "--plugins", "visoin", "-o", "x"], 2, ["unknown plug-in 'visoin'"]),
        (["compose", "--plugins", "video", "-o", "x"], 2, ["pip install xoron-video"]),
        (["compose", "--preset", "tinny", "-o", "x"], 2, ["Did you mean 'tiny'"]),
        (["compose"], 2, ["-o DIR"]),
        (["compose", "-f", "none.yaml", "-o", "x"], 2, ["none.yaml", "No such file"]),
        (["compose", "--set", "backbone.num_layer=3", "-o", "x"], 2, ["Did you mean 'num_layers'"]),
        (["compose", "--set", "backbone.num_layers=many", "-o", "x"], 2, ["integer", "'many'"]),
        (["compose", "--set", "backbone", "-o", "x"], 2, ["key=value"]),
        (
            ["compose", "--set", "video.autoencoder.use=vidtok", "-o", "x"],
            2,
            ["pip install xoron-video"],
        ),
        (
            ["compose", "--set", "audio.encoder.depth=4", "-o", "x"],
            2,
            ["audio.encoder", "`use: NAME`"],
        ),
        (
            ["compose", "--set", "tokens.groups=[reasonin]", "-o", "x"],
            2,
            ["Did you mean 'reasoning'"],
        ),
        (["compose", "--set", "backbone.num_heads=7", "-o", "x"], 2, ["num_heads"]),
        (["compose", "--wrong"], 2, ["--wrong"]),
        (["composed"], 2, ["Did you mean 'compose'"]),
        (["export", "x"], 2, ["pip install xoron-export"]),
        (["inspect", "no/such/folder"], 1, ["there is no such folder"]),
        (["generate", "no/such/folder", "x"], 1, ["there is no such folder"]),
        (["generate", ".", "x", "--temperature", "-1"], 2, ["temperature", "0 or more"]),
        (["generate", ".", "x", "--max-new-tokens", "0"], 2, ["expected 1 or more"]),
        (["tokens", "show", "no/such"], 1, ["no such"]),
        (["schema", "backbone/xoron-mo"], 2, ["Did you mean 'backbone/xoron-moe'"]),
        (["schema", "backbone"], 2, ["KIND/NAME"]),
    ],
)
def test_a_mistake_is_one_clear_message(capsys, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    _, err = call(capsys, *arguments, code=code)
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_yaml_mistake_names_file_and_line(capsys, tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text("tokenizer: {use: byte}\nbackbone:\n  use: xoron-moe\n  num_layer: 2\n")
    _, err = call(capsys, "compose", "-f", file, "-o", tmp_path / "x", code=2)
    assert f"{file}:4" in err
    assert "num_layers" in err


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["is not a model folder"]),
        (lambda f: (f / "config.json").write_text("{"), ["not valid JSON"]),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
            ["'llama'", "use: hf"],
        ),
        (lambda f: (f / "token_space.json").unlink(), ["token_space.json", "No such file"]),
        (lambda f: (f / "model.safetensors.index.json").unlink(), ["index.json"]),
        (
            lambda f: (f / "slots" / "backbone-00001.safetensors").unlink(),
            ["backbone-00001", "missing"],
        ),
        (
            lambda f: (f / "slots" / "backbone-00001.safetensors").write_bytes(b"short"),
            ["backbone-00001", "truncated"],
        ),
        (
            lambda f: (f / "token_space.json").write_text(
                (f / "token_space.json").read_text().replace("<|user|>", "<|usr|>")
            ),
            ["token_space.json", "sha256"],
        ),
    ],
)
def test_a_damaged_folder_is_named(capsys, copy, break_it, words):
    break_it(copy)
    _, err = call(capsys, "generate", copy, "x", code=1)
    assert all(word in err for word in words), err


def test_composing_over_foreign_files_is_refused(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    _, err = call(capsys, "compose", "--preset", "tiny", "-o", tmp_path, code=2)
    assert "no model" in err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_results_and_messages_use_different_streams(capsys, tmp_path):
    out, err = call(capsys, "compose", "--preset", "tiny", "-o", tmp_path / "m", "--json")
    assert json.loads(out)["folder"] == str(tmp_path / "m")
    assert "wrote" in err
    logging.getLogger("xoron").handlers.clear()
