"""Proves the chat: history, seeds and reuse of `Chat`, and `xoron chat` through a pipe and at a
prompt, with its commands, interrupts and one-line errors."""

import io
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.utils import logging

import xoron_core
from tests.lively import lively
from xoron_core.chat import Chat
from xoron_core.cli import run
from xoron_core.cli.chat import COMMANDS, converse
from xoron_core.events import Finished, TextDelta
from xoron_core.sampling import Sampling
from xoron_core.session import Session


@pytest.fixture(scope="module")
def pair():
    """A tiny model of large random weights, with reasoning markers in its token space."""
    return lively("tokens.groups=[control,conversation,reasoning]")


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    xoron_core.save(*pair, path)
    return path


@pytest.fixture(autouse=True)
def quiet():
    """As the command line has it from its start; here transformers is imported long before."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_turns_say_what_a_session_says_to_the_whole_history(pair):
    session = Session(*pair)
    sampling = Sampling(temperature=1.0, seed=5)
    chat = Chat(session, system="Be brief.", sampling=sampling, max_new_tokens=15)
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, text in enumerate(("hi", "why?", "and then?")):
        messages.append({"role": "user", "content": text})
        seeded = Sampling(temperature=1.0, seed=5 + turn)
        expected = session.generate(messages, sampling=seeded, max_new_tokens=15)[0].text
        assert text_of(chat.say(text)) == expected
        messages.append({"role": "assistant", "content": expected.removesuffix("\n")})
        assert chat.history() == messages
    assert chat.prefix.reused > chat.prefix.ran / 2
    chat.reset()
    assert chat.history() == messages[:1]


def test_an_answer_that_is_broken_off_keeps_what_was_said(pair):
    chat = Chat(Session(*pair), max_new_tokens=40)
    events = chat.say("go")
    pieces = [event.text for event in itertools.islice(events, 6)]
    events.close()
    assert chat.messages[1]["content"] == "".join(pieces).removesuffix("\n")
    chat.reset()
    chat.say("never asked for").close()
    assert chat.messages == []


def test_reasoning_is_marked_and_stays_out_of_the_history(pair):
    model, processor = pair
    begin, end = (model.space.id_of(s) for s in ("<|think|>", "<|/think|>"))
    stop = model.generation_config.eos_token_id[0]
    script = [begin, *processor.encode_text("hm"), end, *processor.encode_text("yes"), stop]
    ids = iter([*script, *script])

    def head(hidden):
        logits = torch.zeros(*hidden.shape[:-1], model.space.size)
        logits[..., next(ids)] = 5.0
        return logits

    model.backbone.logits = head
    try:
        for shown, expected in ((True, "hmyes"), (False, "yes")):
            chat = Chat(Session(*pair), show_reasoning=shown)
            assert text_of(chat.say("?")) == expected
            assert chat.messages[-1] == {"role": "assistant", "content": "yes"}
    finally:
        del model.backbone.logits


def pipe(monkeypatch, capsys, folder, lines, *options, code=0):
    """Runs `xoron chat` on lines of standard input; returns its output and errors."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    arguments = ["chat", str(folder), "--max-new-tokens", "12", *options]
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def test_a_pipe_gives_the_answers_and_nothing_else(monkeypatch, capsys, folder, pair):
    chat = Chat(Session(*pair), system="S", max_new_tokens=12)
    expected = ""
    for text in ("hello", "again"):
        said = text_of(chat.say(text))
        expected += said if said.endswith("\n") else said + "\n"
    out, err = pipe(
        monkeypatch, capsys, folder, ["hello", "", "again"], "--temperature", "0", "--system", "S"
    )
    assert out == expected
    assert err == ""


def test_commands_do_what_help_says(monkeypatch, capsys, folder, tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/help", "one", "/reset", "/system New one.", "two", f"/save {file}", " /x", "/quit",
             "never"]  # fmt: skip
    out, err = pipe(monkeypatch, capsys, folder, lines, "--seed", "1")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert [m["content"] for m in saved[:2]] == ["New one.", "two"]
    assert saved[2]["content"] in out
    assert all(name in err for name in COMMANDS)
    assert f"wrote {file}" in err
    assert "system: New one." in err
    alone, _ = pipe(monkeypatch, capsys, folder, ["/system New one.", "two"], "--seed", "1")
    assert saved[2]["content"] in alone, "a reset leaves no trace of what was said"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/hlp", "Did you mean '/help'"),
        ("/save", "/save needs a file"),
        ("/save no/such/folder/x.json", "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(monkeypatch, capsys, folder, line, words):
    lines = [line, "still there?"]
    out, err = pipe(monkeypatch, capsys, folder, lines, "--temperature", "0", code=1)
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert out.strip()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--temperature", "-1"], 2, "temperature"),
        (["--min-p", "2"], 2, "min_p"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty"),
        (["--max-new-tokens", "0"], 2, "1 or more"),
        (["--draft", "no/such/folder"], 1, "no such folder"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, capsys, folder, options, code, words):
    out, err = pipe(monkeypatch, capsys, folder, ["x"], *options, code=code)
    assert words in err
    assert out == ""


def test_a_draft_changes_speed_and_not_words(monkeypatch, capsys, folder):
    greedy = ["--temperature", "0"]
    plain, _ = pipe(monkeypatch, capsys, folder, ["hello", "more"], *greedy)
    fast, _ = pipe(monkeypatch, capsys, folder, ["hello", "more"], *greedy, "--draft", str(folder))
    assert fast == plain
    capsys.readouterr()
    assert run(["generate", str(folder), "hello", "--max-new-tokens", "12", "--json",
                "--draft", str(folder)]) == 0  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    assert data["accepted"] == data["drafted"] > 0
    assert 0 < data["confidence"] <= 1


def test_at_a_prompt_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(pair, monkeypatch, capsys):
    model, _ = pair
    chat = Chat(Session(*pair), max_new_tokens=30)
    typed = iter(["first", KeyboardInterrupt, "second", EOFError])

    def ask(_prompt):
        item = next(typed)
        if isinstance(item, str):
            return item
        raise item

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ask)
    handle = model.backbone.model.base_model.layers[1].register_forward_pre_hook(interrupt)
    assert converse(chat, interactive=True)
    handle.remove()
    out, err = capsys.readouterr()
    assert "(Ctrl-D or /quit ends)" in err
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["first", "second"]
    broken = chat.messages[1]["content"]
    assert out.startswith(broken)
    whole = text_of(Chat(Session(*pair), max_new_tokens=30).say("first"))
    assert whole.startswith(broken)
    assert 0 < len(broken) < len(whole)
    history = chat.messages[:3]
    assert chat.messages[3]["content"] == Session(*pair).generate(history, max_new_tokens=30)[
        0
    ].text.removesuffix("\n"), "the interrupted pass left nothing in the cache"


def test_in_a_pipe_an_interrupt_ends_it(folder, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "stream", interrupt)
    out, _ = pipe(monkeypatch, capsys, folder, ["x", "never"], code=130)
    assert out.strip() == ""


def test_a_conversation_beyond_the_models_length_is_told(pair, monkeypatch, caplog):
    model, _ = pair
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    chat = Chat(Session(*pair), max_new_tokens=10)
    monkeypatch.setattr("sys.stdin", io.StringIO("a rather long message\n"))
    assert converse(chat, interactive=False)
    assert "more than the 20" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_on_a_real_terminal_it_prompts_answers_and_ends(folder):
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from xoron_core.cli import main; main()", "chat", str(folder),
         "--max-new-tokens", "5", "--temperature", "0"],
        stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"hello\n")
    seen = b""
    while seen.count(b"> ") < 2:
        seen += os.read(master, 1024)
    os.write(master, b"\x04")
    assert process.wait(30) == 0
    assert b"/help lists commands" in seen
    assert b"Traceback" not in seen
    os.close(master)


def test_every_turn_ends_once(pair):
    chat = Chat(Session(*pair), max_new_tokens=5)
    for _ in range(2):
        events = list(chat.say("x"))
        assert sum(isinstance(event, Finished) for event in events) == 1
        assert isinstance(events[-1], Finished)
