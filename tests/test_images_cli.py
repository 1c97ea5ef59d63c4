"""Proves images at the command line: with `--image`, `--media` and `/image` is said what the Python
API says to the same message, in order, for any modality; and every mistake is one message before
weights are loaded.
"""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers.utils import logging

import xoron_core
from tests.lively import enliven
from xoron_core.chat import Chat
from xoron_core.cli import run
from xoron_core.model import XoronModel
from xoron_core.sampling import Sampling
from xoron_core.session import Session

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")

GREEDY = ["--max-new-tokens", "12", "--temperature", "0"]


@pytest.fixture(scope="module")
def pair():
    model, processor = xoron_core.compose(
        plugins="llm,vision",
        preset="tiny",
        overrides=["backbone.num_layers=2", "backbone.tie_word_embeddings=false"],
    )
    enliven(model)
    return model, processor


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("seeing") / "model"
    xoron_core.save(*pair, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    found = []
    for seed in range(3):
        blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        found.append(str(folder / f"image {seed}.png"))
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(found[-1])
    return found


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def unloaded(monkeypatch):
    """Fails a test in which weights are loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded before the mistake was told")

    monkeypatch.setattr(XoronModel, "from_pretrained", refuse)


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert not code or len(err.strip().splitlines()) == 1, err
    return out, err


def content(text, *paths):
    return [*({"type": "image", "image": path} for path in paths), {"type": "text", "text": text}]


def said(pair, *messages):
    return Session(*pair).generate(list(messages), max_new_tokens=12)[0].text


def test_generate_says_what_the_session_says_to_images_in_order(pair, folder, files, capsys):
    answers = []
    for paths in ((), files[:1], files[:2], files[1::-1]):
        options = [word for path in paths for word in ("--image", path)]
        out, _ = call(capsys, "generate", folder, "what?", *options, *GREEDY)
        answers.append(out.removesuffix("\n"))
        assert answers[-1] == said(pair, {"role": "user", "content": content("what?", *paths)})
    assert len(set(answers)) == 4, "what is shown changes what is said"
    out, _ = call(
        capsys, "generate", folder, "what?", *GREEDY,
        "--media", f"image={files[1]}", "--image", files[0],
    )  # fmt: skip
    assert out.removesuffix("\n") == answers[2], "images first, then other media"


def test_a_prompt_from_standard_input_and_json_name_the_media(
    pair, folder, files, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?"))
    out, _ = call(capsys, "generate", folder, "-", "--image", files[0], "--json", "--system", "S",
                  *GREEDY)  # fmt: skip
    answer = json.loads(out)
    system = {"role": "system", "content": "S"}
    asked = {"role": "user", "content": content("what?", files[0])}
    assert answer["text"] == said(pair, system, asked)
    assert answer["media"] == [{"type": "image", "path": files[0]}]
    out, _ = call(capsys, "generate", folder, "what?", "--json", *GREEDY)
    assert "media" not in json.loads(out)


def test_a_draft_changes_no_word_about_an_image(folder, files, capsys):
    ask = ["generate", folder, "what?", "--image", files[0], *GREEDY]
    plain, _ = call(capsys, *ask)
    fast, _ = call(capsys, *ask, "--draft", folder)
    assert fast == plain


def pipe(monkeypatch, capsys, folder, lines, *options, code=0):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert run(["chat", str(folder), *GREEDY, *options]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def history(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_chat_shows_each_image_with_the_message_it_was_attached_to(
    pair, folder, files, monkeypatch, capsys, tmp_path
):
    talk = tmp_path / "talk.json"
    lines = ["first", f"/image {files[1]}", f"/media image {files[2]}", "second", "third",
             f"/save {talk}"]  # fmt: skip
    out, err = pipe(monkeypatch, capsys, folder, lines, "--image", files[0])
    saved = history(talk)
    users = [m["content"] for m in saved if m["role"] == "user"]
    paths = [
        [part["path"] for part in user if part["type"] == "image"] if isinstance(user, list) else []
        for user in users
    ]
    assert paths == [files[:1], files[1:], []]
    assert f"{files[1]} goes with the next message" in err
    for turn in range(1, 6, 2):
        expected = said(pair, *saved[:turn]).removesuffix("\n")
        assert saved[turn] == {"role": "assistant", "content": expected}
        assert expected in out
    blind = [{"role": m["role"], "content": "first"} for m in saved[:1]]
    assert saved[1]["content"] != said(pair, *blind).removesuffix("\n")


def test_a_chat_with_images_reuses_what_is_cached(pair, files):
    chat = Chat(Session(*pair), max_new_tokens=8, sampling=Sampling())
    chat.attach({"type": "image", "path": files[0]})
    list(chat.say("one"))
    ran = chat.prefix.ran
    list(chat.say("two"))
    assert chat.prefix.reused >= ran, "the image of the first turn is not run again"
    assert chat.prefix.ran - ran < 30


def test_attached_media_wait_for_a_turn_that_happens_and_reset_forgets_them(pair, files):
    chat = Chat(Session(*pair), max_new_tokens=4)
    chat.attach({"type": "image", "path": files[0]})
    chat.say("never read").close()
    assert len(chat.attached) == 1
    list(chat.say("now"))
    assert chat.attached == []
    assert len(chat.messages[0]["content"]) == 2
    chat.attach({"type": "image", "path": files[0]})
    chat.reset()
    assert chat.attached == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image", "/image cat.png"),
        ("/media image", "/media image cat.png"),
        ("/image no/such.png", "no/such.png: cannot be read"),
        ("/media sound x.wav", "this model takes: text, image"),
    ],
)
def test_a_wrong_attachment_is_one_line_and_the_chat_goes_on(
    folder, monkeypatch, capsys, line, words
):
    out, err = pipe(monkeypatch, capsys, folder, [line, "still there?"], code=1)
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert out.strip()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_mistakes_are_told_before_weights_are_loaded(
    folder, files, capsys, tmp_path, command, unloaded
):
    def wrong(*options, code, words):
        prompt = ["what?"] if command == "generate" else []
        _, err = call(capsys, command, folder, *prompt, *options, code=code)
        assert words in err, err

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no")
    wrong("--image", "no/such.png", code=1, words="no/such.png: cannot be read")
    wrong("--image", files[0], "--image", broken, code=1, words="broken.png")
    wrong("--image", tmp_path, code=1, words=f"{tmp_path}: cannot be read")
    wrong("--image", "https://example.org/a.png", code=1, words="XORON_IMAGE_URLS=1")
    wrong("--media", "image", code=2, words="expected TYPE=PATH")
    wrong("--media", "=a.png", code=2, words="expected TYPE=PATH")
    wrong("--media", "sound=a.wav", code=1, words="this model takes: text, image")
    if command == "generate":
        wrong("--image", files[0], "--raw", code=2, words="leave out --raw")


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("plugins", "code", "words"),
    [
        ("llm", 1, ["content of type 'image'", "pip install xoron-vision"]),
        ("vision", 2, ["nothing in slot 'backbone'", "pip install xoron-llm"]),
    ],
)
def test_a_model_that_cannot_says_what_to_install(
    tmp_path, capsys, files, command, plugins, code, words, unloaded
):
    assert run(["-q", "compose", "--plugins", plugins, "--preset", "tiny", "-o",
                str(tmp_path / "m")]) == 0  # fmt: skip
    prompt = ["what?"] if command == "generate" else []
    _, err = call(capsys, command, tmp_path / "m", *prompt, "--image", files[0], code=code)
    assert all(word in err for word in words), err


def test_an_encoder_without_projector_is_named(tmp_path, capsys, files, unloaded):
    composition = {
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
        "image": {"encoder": {"use": "siglip", "preset": "tiny"}},
    }
    xoron_core.save(*xoron_core.compose(composition), tmp_path / "m")
    _, err = call(capsys, "generate", tmp_path / "m", "x", "--image", files[0], code=2)
    assert "nothing fills 'image.projector'" in err


def test_a_third_partys_medium_goes_the_same_way(toy, tmp_path, capsys):
    model, processor = xoron_core.compose(
        {
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "signal": {"encoder": {"use": "signal-encoder"},
                       "projector": {"use": "signal-projector"}},
        }
    )  # fmt: skip
    enliven(model)
    xoron_core.save(model, processor, tmp_path / "m")
    waves = [np.sin(np.arange(16) * speed) for speed in (0.3, 1.4)]
    answers = []
    for index, wave in enumerate(waves):
        np.savetxt(tmp_path / f"{index}.txt", wave)
        out, _ = call(capsys, "generate", tmp_path / "m", "up?", *GREEDY,
                      "--media", f"signal={tmp_path}/{index}.txt")  # fmt: skip
        part = {"type": "signal", "signal": np.loadtxt(tmp_path / f"{index}.txt")}
        asked = {"role": "user", "content": [part, {"type": "text", "text": "up?"}]}
        assert out.removesuffix("\n") == said((model, processor), asked)
        answers.append(out)
    assert answers[0] != answers[1]
    _, err = call(capsys, "generate", tmp_path / "m", "x", "--media", "signal=none.txt", code=1)
    assert "none.txt: cannot be loaded as signal" in err
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "words.txt")
    _, err = call(capsys, "generate", tmp_path / "m", "x", "--media",
                  f"signal={tmp_path / 'words.txt'}", code=1)  # fmt: skip
    assert "cannot be loaded as signal" in err
