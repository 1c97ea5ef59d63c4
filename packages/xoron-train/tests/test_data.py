"""Proves that sources read what is there and name what they cannot read, that the mixture holds its
shares, and that a stream restored at any point goes on with exactly the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xoron_core.errors import ConfigError, DataError
from xoron_train.data.cursor import Cursor, held_out_documents
from xoron_train.data.sources import Document, StreamedSource, UnreadableError, open_source
from xoron_train.data.stream import (
    DocumentTokens,
    TrainStream,
    held_out_rows,
    held_out_texts,
    training_texts,
)
from xoron_train.recipe import Recipe, SourceConfig, load_recipe

TEXTS = [f"text number {number} {'abc ' * (number % 5)}" for number in range(60)]


class Plain(DocumentTokens):
    """One token per character, without a tokenizer."""

    def __init__(self) -> None:
        self.begin = [300]
        self.end = [301]

    def __call__(self, text: str) -> list[int]:
        return [*self.begin, *text.encode(), *self.end]


class Numbers(StreamedSource):
    """A stream of numbered documents, some unreadable."""

    name = "numbers"
    block_size = 7

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        self.size, self.bad = size, bad

    def read_from(self, start: int) -> Iterator[Document | UnreadableError]:
        for index in range(start, self.size):
            if index in self.bad:
                yield UnreadableError(f"numbers[{index}]", "is bad")
            else:
                yield Document(str(index), f"text {index}")


def source(kind: str, path: Path, **keys: Any) -> Any:
    return open_source("s", SourceConfig.parse({"kind": kind, "path": str(path), **keys}))


def drain(opened: Any, fraction: float = 0.0, seed: int = 3) -> list[str]:
    return drain_cursor(Cursor(opened, seed=seed, eval_fraction=fraction, max_unreadable=0.0))


def drain_cursor(cursor: Cursor) -> list[str]:
    """The texts of one epoch."""
    texts: list[str] = []
    while True:
        document = cursor.next()
        if cursor.epoch:
            return texts
        texts.append(document.text)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    lines = [json.dumps({"body": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:40]))
    (folder / "b.jsonl").write_text("".join(lines[40:]))
    pq.write_table(pa.table({"body": TEXTS}), folder / "c.parquet")
    (folder / "d.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The `datasets` library prepares tables in a folder of the test's own."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("jsonl", "*.jsonl"), ("parquet", "c.parquet")])
def test_tables_give_their_texts_in_a_seeded_order(
    tables: Path, kind: str, name: str, streaming: bool
) -> None:
    keys: dict[str, Any] = {"field": "body", "streaming": streaming}
    if streaming:
        keys["block_size"] = 16
    first = drain(source(kind, tables / name, **keys))
    assert sorted(first) == sorted(TEXTS)
    assert first != TEXTS
    assert first == drain(source(kind, tables / name, **keys))
    assert first != drain(source(kind, tables / name, **keys), seed=4)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document_or_one_per_line(tables: Path, streaming: bool) -> None:
    whole = source("text", tables / "d.txt", streaming=streaming)
    assert drain(whole) == ["\n".join(TEXTS)]
    lines = source("text", tables / "d.txt", sample_by="line", streaming=streaming)
    assert sorted(text.rstrip("\n") for text in drain(lines)) == sorted(TEXTS)


def test_split_is_by_document_without_overlap_and_without_loss(tables: Path) -> None:
    opened = source("jsonl", tables / "*.jsonl", field="body")
    training = drain(opened, fraction=0.3)
    held = [d.text for d in held_out_documents(opened, eval_fraction=0.3, max_unreadable=0.0)]
    assert held
    assert not set(training) & set(held)
    assert sorted(training + held) == sorted(TEXTS)


def test_copies_of_a_document_fall_on_the_same_side(tmp_path: Path) -> None:
    for number in range(30):
        for copy in ("a", "b"):
            (tmp_path / f"{number}-{copy}.txt").write_text(f"content {number}")
    training = drain(source("files", tmp_path, pattern="*.txt"), fraction=0.5)
    assert 0 < len(training) < 60
    assert all(training.count(text) == 2 for text in training)


@pytest.mark.parametrize("cut", [0, 1, 6, 7, 8, 20, 33])
def test_a_stream_restored_anywhere_goes_on_exactly(cut: int) -> None:
    def cursor() -> Cursor:
        opened = Numbers(25, frozenset({3}))
        return Cursor(opened, seed=1, eval_fraction=0.2, max_unreadable=0.1)

    one = cursor()
    for _ in range(cut):
        one.next()
    other = cursor()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.next() for _ in range(40)] == [other.next() for _ in range(40)]


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_whole_training_stream_restored_goes_on_exactly(
    new_recipe: Callable[..., Recipe], corpus: Path, rows: int
) -> None:
    recipe = new_recipe(
        shuffle_rows=7,
        mixture={
            "a": {"kind": "files", "path": str(corpus), "pattern": "0*.txt", "weight": 2.0},
            "b": {"kind": "files", "path": str(corpus), "pattern": "[1-3]*.txt"},
        },
    )
    one, other = TrainStream(recipe, Plain()), TrainStream(recipe, Plain())
    one.rows(rows)
    state = one.state_dict()
    other.load_state_dict(state._replace(data=json.loads(json.dumps(state.data))))
    for row, copy in zip(one.rows(150), other.rows(150), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(row, copy, strict=True))
    assert one.cursors["a"].epoch > 0  # it went round, so epochs are covered too


def test_shuffled_rows_are_the_rows_of_each_block(new_recipe: Callable[..., Recipe]) -> None:
    plain = TrainStream(new_recipe(shuffle_rows=1), Plain()).rows(24)
    mixed = TrainStream(new_recipe(shuffle_rows=8), Plain()).rows(24)
    texts = [[row.tokens.tolist() for row in rows] for rows in (plain, mixed)]
    assert texts[0] != texts[1]
    for start in range(0, 24, 8):
        assert sorted(texts[0][start : start + 8]) == sorted(texts[1][start : start + 8])


def test_the_mixture_holds_token_shares_whatever_the_documents_sizes(
    new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name, size in (("long", 4000), ("short", 40)):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.txt").write_text(str(number) * size)
    weights = {"long": 1.0, "short": 3.0}
    recipe = new_recipe(
        eval_fraction=0.0,
        mixture={
            name: {"kind": "files", "path": str(tmp_path / name), "weight": weight}
            for name, weight in weights.items()
        },
    )
    stream = TrainStream(recipe, Plain())
    stream.rows(8000)
    share = stream.drawn["short"] / sum(stream.drawn.values())
    assert share == pytest.approx(0.75, abs=0.02)


def test_unreadable_files_are_named_and_too_many_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}")
    (tmp_path / "05.txt").write_bytes(b"\xff\xfe broken")
    opened = source("files", tmp_path)
    tolerant = Cursor(opened, seed=0, eval_fraction=0.0, max_unreadable=0.05)
    assert len({tolerant.next().text for _ in range(60)}) == 19
    assert [r.getMessage() for r in caplog.records] == [
        "mixture.s: left out 05.txt: is not UTF-8 (byte 0)"
    ]
    strict = Cursor(opened, seed=0, eval_fraction=0.0, max_unreadable=0.04)
    with pytest.raises(DataError, match=r"1 of 20 documents are unreadable.*05\.txt: is not UTF-8"):
        drain_cursor(strict)


def test_rows_without_text_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"s\[1\]: expected text, got NoneType"):
        drain(source("jsonl", tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", None, "no file matches"),
        ("jsonl", "", "is empty"),
        ("jsonl", '{"body": "x"}\n', "has no column 'text'; it has body"),
        ("jsonl", "no json\n", "cannot be opened as 'jsonl'"),
        ("parquet", "no parquet", "cannot be opened as 'parquet'"),
    ],
)
def test_bad_tables_are_one_clear_error(
    tmp_path: Path, kind: str, content: str | None, message: str
) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        source(kind, path)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        source("files", tmp_path / "absent")
    with pytest.raises(DataError, match=r"no file below .* matches '\*\*/\*\.txt'"):
        source("files", tmp_path)
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(DataError, match="no training document among 1 "):
        drain(source("files", tmp_path))


def test_changed_documents_are_refused_on_resume(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaa")
    state = Cursor(
        source("files", tmp_path), seed=0, eval_fraction=0.0, max_unreadable=0.0
    ).state_dict()
    (tmp_path / "b.txt").write_text("b")
    later = Cursor(source("files", tmp_path), seed=0, eval_fraction=0.0, max_unreadable=0.0)
    with pytest.raises(DataError, match="documents have changed since the checkpoint"):
        later.load_state_dict(state)


def test_the_held_out_rows_hold_every_byte_of_the_held_out_texts(
    new_recipe: Callable[..., Recipe],
) -> None:
    recipe = new_recipe()
    rows = held_out_rows(recipe, "words", Plain(), limit=None)
    texts = list(held_out_texts(recipe, "words"))
    assert texts
    assert not set(texts) & set(training_texts(recipe, "words"))
    # Every byte but the bridged ones stands once; documents begin with 300.
    documents = sum(int((row.tokens == 300).sum()) for row in rows)
    assert documents == len(texts)
    assert len(held_out_rows(recipe, "words", Plain(), limit=2)) == 2


def test_stdlib_leaves_third_party_packages_out() -> None:
    opened: Any = open_source("s", load_recipe("text-tiny").mixture["stdlib"])
    names = [path.as_posix() for path in opened.files]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not [name for name in names if "-packages/" in name or "/test/" in name]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class NoEnd:
        eos_token_id = None

    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        DocumentTokens(NoEnd())  # type: ignore[arg-type]
