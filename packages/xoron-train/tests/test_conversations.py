"""Proves that conversations are read from tables wherever their media stand, that no medium is on
both sides of the split or trained on from a golden set, and that what cannot be used is named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.api import load
from xoron_core.descriptors import resolve
from xoron_core.errors import DataError, UsageError
from xoron_core.processor import XoronProcessor
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation
from xoron_train.data.conversations import ConversationTable
from xoron_train.data.cursor import Cursor
from xoron_train.data.media_hash import conversation_digests, medium_digest
from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.data.talks import GOLDEN, MIXED, Talk, TalkSource
from xoron_train.recipe import Recipe

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}


@pytest.fixture(scope="module")
def processor(new_model: Callable[..., Path]) -> XoronProcessor:
    return load(new_model(grid=GRID))[1]


def grid(number: int, rows: int = 2) -> np.ndarray:
    return np.arange(4 * rows, dtype=np.float32).reshape(rows, 4) + number


def load_grid(source: Any) -> np.ndarray:
    """The stand-in plug-in's own; it can be imported only while that is installed."""
    return resolve("standin_media:load_grid")(source)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shows(*media: Any, answer: str = "yes") -> list[dict[str, Any]]:
    parts = [{"type": "grid", "grid": medium} for medium in media]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": answer},
    ]


def write_lines(path: Path, conversations: Sequence[Any], column: str = "messages") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: talk}) + "\n" for talk in conversations))
    return path


def sides(source: TalkSource) -> list[str]:
    """The side of every conversation."""
    return [talk.on for talk in source.walk(range(len(source))) if isinstance(talk, Talk)]


def source(
    processor: XoronProcessor, conversations: Sequence[Conversation], **keys: Any
) -> TalkSource:
    keys = {"wanted": TRAIN, "length": 512, "eval_fraction": 0.3, **keys}
    return TalkSource("s", conversations, processor=processor, **keys)


def test_lines_and_their_media_are_found_from_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "data/media"
    folder.mkdir(parents=True)
    np.save(folder / "a.npy", grid(7))
    lines = write_lines(tmp_path / "data/x.jsonl", [shows("media/a.npy"), shows("data:,x")])
    lines.write_text("\n" + lines.read_text() + "\n")  # empty lines hold nothing
    table = ConversationTable("mixture.x", str(tmp_path / "*/x.jsonl"))
    assert [table[index].name for index in range(len(table))] == ["x.jsonl:1", "x.jsonl:2"]
    first, second = (table[index].messages[0]["content"][0]["grid"] for index in range(2))
    assert np.array_equal(load_grid(first), grid(7))
    assert second == "data:,x"


def test_parquet_brings_bytes_files_and_messages_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    np.save(tmp_path / "b.npy", grid(2))
    nested = [
        [{"role": "user", "content": [{"type": "grid", "grid": npy(grid(1)), "text": None}]}],
        [{"role": "user", "content": [{"type": "grid", "path": "b.npy", "text": None}]}],
    ]
    pq.write_table(pa.table({"messages": nested}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"messages": [json.dumps(shows("b.npy"))]}), tmp_path / "2.parquet")
    table = ConversationTable("mixture.x", str(tmp_path / "*.parquet"))
    assert len(table) == 3
    parts = [table[index].messages[0]["content"][0] for index in range(3)]
    assert [min(part) for part in parts] == ["grid", "path", "grid"]
    assert {len(part) for part in parts} == {2}  # without nulls
    media = [part.get("grid", part.get("path")) for part in parts]
    for medium, number in zip(media, (1, 2, 2), strict=True):
        assert np.array_equal(load_grid(medium), grid(number))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", None, "no file matches"),
        ("x.jsonl", "", "holds no conversation"),
        ("x.jsonl", '{"talk": []}\n', r"no column 'messages'; it has talk\. Set mixture.x.field"),
        ("x.jsonl", "no json\n", r"x\.jsonl cannot be opened: .*is no JSON"),
        ("x.parquet", "no parquet", r"x\.parquet cannot be opened"),
        ("x.csv", "a,b\n", r"neither \.jsonl nor \.parquet"),
    ],
)
def test_bad_tables_are_one_clear_error(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        ConversationTable("mixture.x", str(tmp_path / name))


@settings(max_examples=60, deadline=None)
@given(
    shown=st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=30),
    fraction=st.sampled_from([0.2, 0.5]),
)
def test_no_medium_is_on_both_sides(
    processor: XoronProcessor, shown: list[list[int]], fraction: float
) -> None:
    conversations = [
        Conversation(str(number), shows(*map(grid, media), answer=f"{number} says"))
        for number, media in enumerate(shown)
    ]
    opened = source(processor, conversations, eval_fraction=fraction)
    other = source(processor, conversations, eval_fraction=fraction, wanted=HELD_OUT)
    found = sides(opened)
    assert found == sides(other) == sides(opened)  # the second time it is remembered
    media = {
        side: {n for n, on in zip(shown, found, strict=True) if on == side for n in n}
        for side in (TRAIN, HELD_OUT)
    }
    assert not media[TRAIN] & media[HELD_OUT]
    for numbers, on in zip(shown, found, strict=True):
        alone = {
            source(processor, [Conversation("", shows(grid(n)))], eval_fraction=fraction).read(0).on
            for n in numbers
        }
        if numbers:
            assert on == (alone.pop() if len(alone) == 1 else MIXED)
        else:
            assert on in (TRAIN, HELD_OUT)


def test_copies_of_a_medium_fall_on_one_side_whatever_they_are_called(
    processor: XoronProcessor, tmp_path: Path
) -> None:
    for number in range(12):
        np.save(tmp_path / f"a{number}.npy", grid(number))
        np.save(tmp_path / f"b{number}.npy", grid(number).astype(np.float64))
    forms = [
        lambda number: str(tmp_path / f"a{number}.npy"),
        lambda number: tmp_path / f"b{number}.npy",
        lambda number: npy(grid(number)),
        grid,
    ]
    found = [
        sides(source(processor, [Conversation("", shows(form(n))) for n in range(12)]))
        for form in forms
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert {TRAIN, HELD_OUT} == set(found[0])


def test_digests_tell_shape_kind_and_content_apart() -> None:
    flat = np.arange(6, dtype=np.uint8)
    shapes = [flat, flat.reshape(2, 3), flat.reshape(3, 2), flat.astype(np.int16), flat + 1]
    values = [*shapes, (flat, 16000), (flat, 8000), {"a": flat}, {"b": flat}, "ab", b"ab", 1, None]
    digests = [medium_digest(value, "grid") for value in values]
    assert len(set(digests)) == len(values)
    assert medium_digest(flat.copy(), "grid") == digests[0] != medium_digest(flat, "image")
    with pytest.raises(UsageError, match="modality 'x' loads objects of type object"):
        medium_digest(object(), "x")


def test_what_holds_a_golden_medium_is_not_trained_on(
    processor: XoronProcessor,
    new_recipe: Callable[..., Recipe],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    np.save(tmp_path / "other-name.npy", grid(3))
    golden = write_lines(tmp_path / "gold/gold.jsonl", [shows("../other-name.npy")])
    media = [[0], [3], [1, 3], [2]]
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", grid(number))
    lines = write_lines(
        tmp_path / "train.jsonl", [shows(*[f"{n}.npy" for n in shown]) for shown in media]
    )
    keys: dict[str, Any] = {
        "mixture": {"x": {"kind": "conversations", "path": str(lines)}},
        "eval_fraction": 0.0,
        "sequence_length": 512,
    }
    free = TalkMixture(new_recipe(**keys), processor).training["x"]
    assert sides(free) == [TRAIN] * 4
    caplog.set_level("INFO", "xoron.train")
    kept = TalkMixture(new_recipe(**keys, golden=[str(golden)]), processor).training["x"]
    assert sides(kept) == [TRAIN, GOLDEN, GOLDEN, TRAIN]
    assert [record.getMessage() for record in caplog.records] == [
        f"mixture.x: kept train.jsonl:{line} out of training: it holds a medium of the golden set"
        f" ({count} so far)"
        for line, count in ((2, 1), (3, 2))
    ]
    (tmp_path / "other-name.npy").unlink()
    with pytest.raises(DataError, match=r"golden: .*gold\.jsonl: gold\.jsonl:1: .* is no grid"):
        TalkMixture(new_recipe(**keys, golden=[str(golden)]), processor)
    write_lines(golden, [[{"role": "user", "content": "x"}]])
    golden.write_text(golden.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"golden: .*: gold\.jsonl:2: is no JSON .*; mend it"):
        TalkMixture(new_recipe(**keys, golden=[str(golden)]), processor)


def test_a_split_of_a_data_set_may_be_golden(
    processor: XoronProcessor, new_recipe: Callable[..., Recipe]
) -> None:
    mixture = {"x": {"kind": "dataset", "path": "standin-grids", "options": {"size": 5}}}
    recipe = new_recipe(mixture=mixture, golden=["x:train"], sequence_length=512)
    assert sides(TalkMixture(recipe, processor).training["x"]) == [GOLDEN] * 5
    recipe = new_recipe(mixture=mixture, golden=["x:unseen"], sequence_length=512)
    assert sides(TalkMixture(recipe, processor).training["x"]) == [TRAIN] * 5


def test_what_cannot_be_used_is_named_and_too_much_stops(
    processor: XoronProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "good.npy", grid(1))
    (tmp_path / "bad.npy").write_bytes(b"no grid")
    good = shows("good.npy")
    bad = [
        shows("absent.npy"),
        shows("bad.npy"),
        shows("good.npy", answer="long " * 200),
        good[:1],
        [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
        "no messages",
    ]
    lines = write_lines(tmp_path / "x.jsonl", [good] * 4 + bad)
    lines.write_text(lines.read_text() + "{broken\n")
    opened = source(processor, ConversationTable("mixture.s", str(lines)), eval_fraction=0.0)

    def walk(limit: float) -> Cursor[Any]:
        return Cursor(opened, seed=0, eval_fraction=0.0, max_unreadable=limit)

    tolerant = walk(7 / 11)
    assert {tolerant.next().name for _ in range(20)} == {f"x.jsonl:{line}" for line in range(1, 5)}
    reasons = tolerant.unreadable.names
    assert sorted(reasons) == sorted(f"x.jsonl:{line}" for line in range(5, 12))
    for line, reason in (
        (5, "absent.npy': is no grid"),
        (6, "bad.npy': is no grid"),
        (7, "positions, more than sequence_length=512"),
        (8, "the assistant says nothing in it"),
        (9, "content of type 'smell'"),
        (10, "'messages' is no JSON"),
        (11, "is no JSON"),
    ):
        assert reason in reasons[f"x.jsonl:{line}"]
    assert len([r for r in caplog.records if "left out x.jsonl" in r.getMessage()]) == 7
    strict = walk(6 / 11)
    with pytest.raises(DataError, match=r"7 of 11 documents are unreadable.*x\.jsonl:"):
        [strict.next() for _ in range(30)]


def test_media_that_the_model_does_not_take_are_named(new_model: Callable[..., Path]) -> None:
    blind = load(new_model())[1]
    opened = source(blind, [Conversation("c", shows(grid(1)))], eval_fraction=0.0)
    with pytest.raises(DataError, match=r"c: .*content of type 'grid'; this model takes: text"):
        Cursor(opened, seed=0, eval_fraction=0.0, max_unreadable=0.5).next()


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [TRAIN, HELD_OUT])
def test_workers_change_nothing(processor: XoronProcessor, wanted: str) -> None:
    conversations = [Conversation(str(n), shows(grid(n % 9), grid(n))) for n in range(24)]
    conversations[5] = Conversation("5", shows("absent.npy"))
    order = [*range(23, 9, -1), *range(10)]

    def walked(workers: int) -> list[Any]:
        opened = source(processor, conversations, wanted=wanted, workers=workers)
        found = []
        for item in opened.walk(order):
            plan = getattr(item, "plan", None)
            spans = () if plan is None else plan.spans
            rows = [span.item["rows"].tolist() for span in spans]
            found.append((str(item.name), getattr(item, "on", str(item)), rows))
        return [found, opened.sides.tolist()]

    before = torch.get_rng_state()
    alone = walked(0)
    assert walked(1) == walked(2) == alone
    assert {1, 2, 3} <= set(alone[1])
    assert any(rows for _, _, rows in alone[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_workers_error_keeps_its_message(processor: XoronProcessor) -> None:
    broken = resolve("standin_media:Broken")([Conversation("", [])])
    opened = source(processor, broken, workers=1)
    with pytest.raises(UsageError, match=r"^no 0$"):
        list(opened.walk([0]))


def test_conversations_of_text_are_split_by_their_text(processor: XoronProcessor) -> None:
    texts = [
        [{"role": "user", "content": f"q {n % 20}"}, {"role": "assistant", "content": "a"}]
        for n in range(40)
    ]
    found = sides(source(processor, [Conversation(str(n), t) for n, t in enumerate(texts)]))
    assert found[:20] == found[20:]
    assert {TRAIN, HELD_OUT} == set(found)
    assert len({d for text in texts for d in conversation_digests(processor, text)}) == 20


def test_data_sets_bring_their_splits(
    processor: XoronProcessor, new_recipe: Callable[..., Recipe]
) -> None:
    def opened(**keys: Any) -> TalkMixture:
        mixture = {"x": {"kind": "dataset", "path": "standin-grids", **keys}}
        return TalkMixture(new_recipe(mixture=mixture, sequence_length=512), processor)

    talks = opened(options={"size": 6})
    assert [talks.training["x"].read(i).name for i in (0, 5)] == ["train-0", "train-5"]
    assert {t.name for t in talks.held_out("x")} == {f"held-out-{n}" for n in range(6)}
    assert len(list(talks.held_out("x", 2))) == 2
    assert [s.name for s in talks.samples("x", "unseen", 2)] == ["unseen-0", "unseen-1"]
    with pytest.raises(DataError, match="no split 'test'; it has train, held-out, unseen"):
        talks.samples("x", "test", 2)
    with pytest.raises(UsageError, match="size: 0; expected at least 1"):
        opened(options={"size": 0})
    with pytest.raises(
        UsageError, match=r"mixture\.x\.path: unknown data set 'standin-grid'\. Did"
    ):
        opened(path="standin-grid")


def test_talks_are_laid_out_as_the_processor_does(processor: XoronProcessor) -> None:
    messages = shows(grid(1), answer="2.0")
    read = source(processor, [Conversation("", messages)], eval_fraction=0.0).read(0)
    expected = processor(messages, train=True)
    assert read.plan is not None
    assert read.plan.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert (read.plan.learned.sum() == (expected["labels"] != -100).sum()) > 0
