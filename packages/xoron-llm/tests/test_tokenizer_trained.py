"""A tokenizer of one's own: learned merges are those of byte-pair encoding (found again here by
counting), every text comes back, what was written opens with the same ids, other files are refused,
and a composition with it is a model folder like any other."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.api import compose, load, save
from xoron_core.cli import run
from xoron_core.components import Context
from xoron_core.errors import ConfigError, FolderError
from xoron_llm.tokenizers import bpe
from xoron_llm.tokenizers.config import BpeConfig
from xoron_llm.tokenizers.trained import PATTERN, BpeTokenizer, learn, write

CONTEXT = Context(slot="tokenizer")
TEXTS = ["How many red things? two red things, ", "red and redder: the reddest of 10 things\n"] * 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    write(learn(TEXTS, size=280), path)
    return str(path)


def _open(source: str | None) -> BpeTokenizer:
    return BpeTokenizer(BpeConfig(source=source), CONTEXT)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_lost(text: str, source: str) -> None:
    for tokenizer in (_open(source).base(), _open(None).base()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_each_merge_joins_a_most_frequent_pair(source: str) -> None:
    merges = json.loads(Path(source).read_text())["model"]["merges"]
    words = Counter(
        tuple(bytes([b]) for b in piece.encode())
        for t in TEXTS
        for piece in regex.findall(PATTERN, t)
    )
    alphabet = {character: value for value, character in bpe.byte_alphabet().items()}
    for merge in merges:
        left, right = (bytes(alphabet[c] for c in part) for part in merge)
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        assert pairs[left, right] == max(pairs.values())
        words = Counter({_joined(word, left, right): n for word, n in words.items()})
    assert len(merges) == 280 - 256


def _joined(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    made: list[bytes] = []
    for part in word:
        if made and made[-1] == left and part == right:
            made[-1] = left + right
        else:
            made.append(part)
    return tuple(made)


def test_frequent_words_are_one_token_and_bytes_keep_their_ids(source: str) -> None:
    tokenizer, alone = _open(source), _open(None)
    assert tokenizer.base().tokenize(" things red") == ["\u0120things", "\u0120red"]
    assert (tokenizer.text_base().size, alone.text_base().size) == (280, 256)
    assert alone.base()("ä!", add_special_tokens=False)["input_ids"] == list("ä!".encode())
    assert tokenizer.text_base().identity != alone.text_base().identity


def test_a_model_with_it_is_a_folder_like_any_other(source: str, tmp_path: Path) -> None:
    overrides = ["tokenizer.use=bpe", f"tokenizer.source={source}"]
    model, processor = compose(preset="tiny", plugins="llm", overrides=overrides)
    save(model, processor, tmp_path / "m")
    opened = load(tmp_path / "m")[1]
    ids = opened.tokenizer("How many things?")["input_ids"]
    assert ids == processor.tokenizer("How many things?")["input_ids"]
    assert len(ids) < 8
    assert model.get_input_embeddings().weight.shape[0] >= processor.space.size > 280


def test_other_files_are_refused(source: str, tmp_path: Path) -> None:
    data = json.loads(Path(source).read_text())
    added = [{"id": 280, "content": "<x>", "special": True}]
    for name, text in {
        "none": None,
        "torn": "{",
        "added": json.dumps(data | {"added_tokens": added}),
        "split": json.dumps(data).replace(json.dumps(PATTERN), json.dumps("x")),
        "hole": json.dumps(data).replace(": 279", ": 400"),
    }.items():
        path = tmp_path / f"{name}.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(FolderError, match=f"tokenizer bpe: .*{name}"):
            _open(str(path)).text_base()
    with pytest.raises(ConfigError, match="more than 256"):
        learn(TEXTS, size=256)


def test_the_command_writes_what_composes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    text.write_text("\n".join(TEXTS), "utf-8")
    assert run(["tokenizer", str(text), "-o", str(out), "--size", "280"]) == 0
    assert "280 ids" in capsys.readouterr().out
    assert _open(str(tmp_path)).text_base().size == 280
    assert run(["tokenizer", str(tmp_path / "no.txt"), "-o", str(out)]) == 1
    assert "no.txt: cannot be read" in capsys.readouterr().err
