"""Proves trained vocabulary rows at the command line: saved, shown, applied and moved they are what
the Python API makes of them, and whatever does not fit is one message without a traceback; and that
`generate` makes media under settings of their own, as a session does.

The toy plug-in's signal codec brings the new ids.
"""

from __future__ import annotations

import io
import json

import pytest
import torch
from transformers.utils import logging

import xoron_core
from tests.lively import enliven
from tests.test_migrate import other_history
from tests.test_rows import composed, differing, old_form, train
from xoron_core.cli import run
from xoron_core.events import MediaOut
from xoron_core.migrate import migrate
from xoron_core.row_deltas import load_rows, read_rows
from xoron_core.sampling import Choice, Sampling
from xoron_core.session import Session
from xoron_core.storage import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert not code or len(err.strip().splitlines()) == 1, err
    return out, err


@pytest.fixture
def base(tmp_path):
    xoron_core.save(*composed(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(tmp_path):
    model, processor = composed()
    train(model)
    xoron_core.save(model, processor, tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def rows(trained, tmp_path, capsys):
    call(capsys, "delta", "save", trained, "--rows", "-o", tmp_path / "rows")
    return tmp_path / "rows"


def test_rows_are_saved_shown_and_applied(base, trained, rows, tmp_path, capsys):
    model, _ = xoron_core.load(trained)
    shown = json.loads(call(capsys, "delta", "show", rows, "--json")[0])
    assert shown["rows"] == [[256, model.space.size]]
    assert shown["token_space_hash"] == model.space.hash
    table, _ = call(capsys, "delta", "show", rows)
    assert f"256 .. {model.space.size - 1}" in table
    assert "base: backbone sha256:" in table
    call(capsys, "delta", "apply", base, rows, "-o", tmp_path / "whole")
    whole, _ = xoron_core.load(tmp_path / "whole")
    assert differing(whole, model) == {}
    assert differing(whole, xoron_core.load(base)[0]) != {}
    # Sharp enough that what the new markers of the prompt mean decides.
    settings = ["--max-new-tokens", 16, "--temperature", 0.05, "--seed", 1]
    over, _ = call(capsys, "generate", base, "say it", *settings, "--delta", rows)
    assert over == call(capsys, "generate", trained, "say it", *settings)[0]
    assert over != call(capsys, "generate", base, "say it", *settings)[0]


def test_a_chat_goes_over_deltas_too(base, trained, rows, capsys, monkeypatch):
    def said(*arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("say it\nand more\n"))
        options = ["--max-new-tokens", 16, "--temperature", 0.05, "--seed", 1]
        return call(capsys, "chat", *arguments, *options)[0]

    assert said(base, "--delta", rows) == said(trained) != said(base)


def test_what_does_not_fit_is_one_message(base, rows, tmp_path, capsys):
    out = tmp_path / "out"
    other = tmp_path / "other"
    xoron_core.save(*composed(seed=7), other)
    _, err = call(capsys, "delta", "apply", other, rows, "-o", out, code=1)
    assert "was made over another base: slot 'backbone' is sha256:" in err
    _, err = call(capsys, "generate", other, "x", "--delta", rows, code=1)
    assert "was made over another base" in err
    text = tmp_path / "text"
    xoron_core.save(*composed(codec=None), text)
    _, err = call(capsys, "delta", "apply", text, rows, "-o", out, code=1)
    assert "was made with token space sha256:" in err
    file = rows / "trainable_rows.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    next(iter(tensors.values()))[0, 0] += 1
    write_tensors(file, tensors)
    for arguments in (["delta", "show", rows], ["delta", "apply", base, rows, "-o", out]):
        assert "changed or damaged" in call(capsys, *arguments, code=1)[1]
    assert not out.exists()
    for options in ([], ["--rows", "--slot", "backbone"]):
        _, err = call(capsys, "delta", "save", base, *options, "-o", out, code=2)
        assert "--slot SLOT, once or more, or --rows alone" in err


def test_the_old_form_goes_over_a_base_that_is_trusted(base, trained, rows, tmp_path, capsys):
    model, _ = xoron_core.load(trained)
    size = model.space.size
    names = {
        "embed_tokens.weight": model.get_input_embeddings(),
        "lm_head.weight": model.get_output_embeddings(),
    }
    values = {name: module.weight[256:size].detach().clone() for name, module in names.items()}
    old = old_form(tmp_path / "old", values, base_vocab_size=256, vocab_size=size)
    out = tmp_path / "whole"
    for arguments in (["delta", "apply", base, old, "-o", out], ["delta", "show", old]):
        assert "--trust-base" in call(capsys, *arguments, code=1)[1]
    call(capsys, "delta", "apply", base, old, "-o", out, "--trust-base")
    assert differing(xoron_core.load(out)[0], model) == {}
    for wrong in ([old, rows], [rows]):
        _, err = call(capsys, "delta", "apply", base, *wrong, "-o", out, "--trust-base", code=2)
        assert "name folders with trainable_rows.pt, behind all others" in err


def test_rows_move_to_another_token_space(base, trained, rows, tmp_path, capsys):
    model, processor = xoron_core.load(base)
    target = other_history(model.space)
    target.save(tmp_path / "token_space.json")
    move = ["tokens", "migrate", rows, "--to", tmp_path / "token_space.json"]
    call(capsys, *move, "-o", tmp_path / "moved", "--base", base)
    assert read_rows(tmp_path / "moved").record.token_space_hash == target.hash
    there, _ = migrate(model, processor, target)
    load_rows(there, tmp_path / "moved")
    expected, _ = migrate(*xoron_core.load(trained), target)
    assert differing(there, expected) == {}
    _, err = call(capsys, *move, "-o", tmp_path / "no", code=2)
    assert "holds trained rows; name the model that they belong to: --base DIR" in err
    other = tmp_path / "other"
    xoron_core.save(*composed(seed=7), other)
    _, err = call(capsys, *move, "-o", tmp_path / "no", "--base", other, code=1)
    assert "was made over another base" in err
    assert not (tmp_path / "no").exists()
    whole = ["tokens", "migrate", trained, *move[3:], "-o", tmp_path / "no"]
    assert "leave it out" in call(capsys, *whole, "--base", base, code=2)[1]


@pytest.fixture
def maker(tmp_path):
    """A model whose answer to `go` begins with a signal."""
    model, processor = composed()
    enliven(model)
    batch = processor([{"role": "user", "content": "go"}])
    with torch.no_grad():
        last = model(**batch, use_cache=False).hidden[0, -1]
        head = model.get_output_embeddings().weight
        head[model.space.id_of("<|gen_signal|>")] = 20 * last / last.norm()
    xoron_core.save(model, processor, tmp_path / "maker")
    return tmp_path / "maker"


def test_made_media_have_settings_of_their_own_and_a_file(maker, tmp_path, capsys):
    session = Session(*xoron_core.load(maker))

    def media(**settings):
        sampling = Sampling(seed=3, modalities={"signal": Choice(**settings)} if settings else {})
        talk = [{"role": "user", "content": "go"}]
        events = session.stream(talk, makes=["signal"], max_new_tokens=8, sampling=sampling)
        return [event.media for event in events if isinstance(event, MediaOut)]

    ask = ["generate", maker, "go", "--make", "signal", "--max-new-tokens", 8, "--seed", 3]
    made = {}
    for name, settings in (("greedy", {}), ("hot", {"temperature": 30.0, "top_k": 7})):
        words = [w for k, v in settings.items() for w in ("--sampling", f"signal.{k}={v}")]
        file = tmp_path / f"{name}.safetensors"
        shown = json.loads(call(capsys, *ask, *words, "-o", file, "--json")[0])
        made[name] = list(read_tensors(file).values())
        expected = media(**settings)
        assert len(made[name]) == len(expected) > 0
        assert all(map(torch.equal, made[name], expected))
        shape = list(expected[0].shape)
        assert shown["made"][0] == {"name": "signal.0", "shape": shape}
    assert not torch.equal(made["greedy"][0], made["hot"][0])
    _, err = call(capsys, *ask)
    assert "made signal.0" in err
    _, err = call(capsys, *ask[:3], "-o", tmp_path / "x", code=2)
    assert "say which it may hold: --make TYPE" in err


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("signal", "expected TYPE.KEY=VALUE"),
        ("temperature=1", "expected TYPE.KEY=VALUE"),
        ("signal.temprature=1", "Did you mean 'temperature'"),
        ("signal.top_k=many", "'top_k'"),
        ("signal.temperature=[", "is not a YAML value"),
        ("signal.temperature=-1", "temperature -1.0: expected 0 or more"),
        ("sound.temperature=1", "sampling is set for sound; this model's modalities: signal"),
    ],
)
def test_a_wrong_setting_is_one_message(base, capsys, item, words):
    _, err = call(capsys, "generate", base, "go", "--sampling", item, code=2)
    assert words in err
