"""Proves that shards hold exactly the ids a forward pass would see, that their bytes depend neither
on interruptions nor on workers, and that what cannot be tokenised is named and stops a build."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xoron_core.api import compose, load, save
from xoron_core.errors import ConfigError, DataError, FolderError, UsageError
from xoron_core.fill import split_spans
from xoron_core.media import write_codes
from xoron_core.pieces import CodedPiece
from xoron_core.tokens.space import TokenSpace
from xoron_train.conversation import HELD_OUT, TRAIN
from xoron_train.data.config import SourceConfig
from xoron_train.data.conversations import ConversationTable
from xoron_train.data.talks import MIXED, TalkSource
from xoron_train.shards import build as builder
from xoron_train.shards.build import build
from xoron_train.shards.origin import origin
from xoron_train.shards.record import RECORD, file_hash, read_record, shard_name
from xoron_train.shards.rows import read_table


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder."""
    files = [shard.file for shard in read_record(folder).shards]
    return [row for file in files for row in read_table(folder / file).to_pylist()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_what_a_forward_pass_sees(
    talks: Any, model: Path, lines: Path, shards: Path
) -> None:
    loaded, processor = load(model)
    source = ConversationTable("t", str(lines))
    rows = rows_of(shards)
    assert len(rows) > 20
    for row in rows:
        batch = processor(source[row["number"]].messages, train=True)
        ids, labels = write_codes(
            loaded, batch.get("media") or {}, batch["input_ids"], batch["labels"]
        )
        assert row["name"] == f"talks.jsonl:{row['number'] + 1}"
        assert row["input_ids"] == ids[0].tolist()
        learned = torch.tensor(row["learned"])
        assert torch.equal(torch.where(learned, ids[0], -100), labels[0])
        spans = batch.get("media", {}).get("grid.codec", {}).get("spans", torch.zeros(0, 3))
        assert [[0, s["start"], s["length"]] for s in row["spans"]] == spans.tolist()


def test_spans_carry_what_decoding_needs(model: Path, lines: Path, shards: Path) -> None:
    loaded, processor = load(model)
    grammar = processor.span_grammar()
    made, differs = 0, 0
    for row in rows_of(shards):
        pieces = [
            p for p in grammar.parse(torch.tensor(row["input_ids"])) if isinstance(p, CodedPiece)
        ]
        assert [piece.made for piece in pieces] == [span["made"] for span in row["spans"]]
        for piece, span in zip(pieces, row["spans"], strict=True):
            grid = np.load(lines.parent / f"{_grid(row, span)}.npy")
            metadata = json.loads(span["metadata"])
            assert metadata["spread"] == pytest.approx(float(np.abs(grid).max()))
            codes = loaded.call("grid.codec", "encode", **_collated(processor, grid)).ids
            assert torch.equal(codes, piece.codes[None])
            made, differs = made + span["made"], differs + (metadata["spread"] != 1.0)
    assert made > 5
    assert differs > 5


def _grid(row: dict[str, Any], span: dict[str, Any]) -> int:
    """The number of a span's grid: the second of a conversation of kind 2 is the one before."""
    return row["number"] - (row["number"] % 4 == 2 and span["made"])


def _collated(processor: Any, grid: np.ndarray) -> dict[str, torch.Tensor]:
    return split_spans(processor.media_batch("grid.codec", [grid]))[1]


def test_the_split_is_the_trainers(model: Path, lines: Path, shards: Path) -> None:
    _, processor = load(model)
    conversations = ConversationTable("t", str(lines))
    source = TalkSource(
        "t", conversations, processor=processor, wanted=TRAIN, length=999, eval_fraction=0.3
    )
    expected = {n: source.read(n).on for n in range(len(source))}
    record = read_record(shards)
    assert {row["number"]: row["split"] for row in rows_of(shards)} == {
        n: on for n, on in expected.items() if on != MIXED
    }
    assert record.left_out == list(expected.values()).count(MIXED) > 0
    assert set(record.splits) == {TRAIN, HELD_OUT}
    assert set(record.tasks) == {"grid->text", "text->grid", "grid->grid", "text->text"}


def test_the_record_is_true(model: Path, shards: Path) -> None:
    record, rows = read_record(shards), rows_of(shards)
    space = TokenSpace.load(model)
    assert record.settings.token_space_hash == space.hash == TokenSpace.load(shards).hash
    assert record.rows == len(rows) == sum(record.splits.values())
    assert record.positions == sum(len(row["input_ids"]) for row in rows)
    assert [shard.sha256 for shard in record.shards] == [
        file_hash(shards / shard.file) for shard in record.shards
    ]
    codec = record.settings.codecs["grid.codec"]
    assert codec.use == "codec/standin-grid"
    assert codec.config["delay"] == 1


def test_other_weights_are_another_codec(model: Path, shards: Path, new_model: Any) -> None:
    other = read_record(shards).settings.codecs["grid.codec"].weights
    loaded, processor = load(model)
    with torch.no_grad():
        loaded.part("grid.codec").down.bias[0] += 1e-3
    changed = model.parent / "changed"
    save(loaded, processor, changed)
    assert origin(changed).codecs["grid.codec"].weights != other
    assert origin(model).codecs["grid.codec"].weights == other


class KilledError(BaseException):
    """As a signal would: nothing may catch it."""


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.booleans())
def test_a_killed_build_goes_on_to_the_same_bytes(
    talks: Any, model: Path, lines: Path, shards: Path, tmp_path: Path, kills: list[int], torn: bool
) -> None:
    folder = tmp_path / "s"
    shutil.rmtree(folder, ignore_errors=True)
    write = builder.write_rows
    for allowed in kills:
        left = allowed

        def killed(path: Path, *rest: Any) -> None:
            nonlocal left
            if not left:
                if torn:  # a process that dies while it writes leaves this
                    path.with_name(f".{path.name}.partial").write_bytes(b"PAR1 half a file")
                raise KilledError
            left -= 1
            write(path, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "write_rows", killed)
            try:
                talks.build(lines, folder, model)
            except KilledError:
                assert not (folder / RECORD).exists()
    talks.build(lines, folder, model)
    complete = {name: data for name, data in bytes_of(folder).items() if name[0] != "."}
    assert complete == bytes_of(shards)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(
    talks: Any, model: Path, lines: Path, shards: Path, tmp_path: Path
) -> None:
    talks.build(lines, tmp_path / "s", model, workers=2)
    assert bytes_of(tmp_path / "s") == bytes_of(shards)


def test_what_stands_is_kept_and_other_settings_are_refused(
    talks: Any,
    model: Path,
    lines: Path,
    shards: Path,
    tmp_path: Path,
    new_model: Callable[..., Path],
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "s"))
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    talks.build(lines, folder, model)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    with pytest.raises(UsageError, match=r"shard-00000.*shard_size was 12, now 13"):
        talks.build(lines, folder, model, shard_size=13)
    with pytest.raises(UsageError, match="token_space_hash was"):
        talks.build(lines, folder, new_model(grid={"codec": {"use": "standin-grid", "levels": 9}}))
    assert bytes_of(folder) == bytes_of(shards)
    (folder / shard_name(1)).write_bytes(b"PAR1")
    with pytest.raises(FolderError, match=r"shard-00001.parquet: is no shard, or damaged"):
        talks.build(lines, folder, model)
    with pytest.raises(UsageError, match=r"config.json.*no shards; choose a new folder"):
        talks.build(lines, model, model)


def test_unreadable_conversations_are_named_and_too_many_stop(
    talks: Any, model: Path, tmp_path: Path
) -> None:
    lines = talks.write(tmp_path / "t", 18, broken=2)
    with pytest.raises(DataError, match=r"2 of 20 .*--max-unreadable 0.05.*talks.jsonl:19"):
        talks.build(lines, tmp_path / "s", model, max_unreadable=0.05)
    talks.build(lines, tmp_path / "s", model, max_unreadable=0.1)
    record = read_record(tmp_path / "s")
    assert list(record.unreadable) == ["talks.jsonl:19", "talks.jsonl:20"]
    assert "lost-0.npy" in record.unreadable["talks.jsonl:19"]
    assert record.rows + record.left_out == 18


def test_what_is_too_long_or_teaches_nothing_is_unreadable(
    talks: Any, model: Path, tmp_path: Path
) -> None:
    talks.write(tmp_path, 4)
    said = [
        talks.shows("0.npy", "a" * 90),
        talks.shows("1.npy", "a"),
        talks.shows("2.npy", "a")[:1],
    ]
    path = tmp_path / "x.jsonl"
    path = talks.lines(tmp_path / "x.jsonl", said)
    build(talks.table(path), tmp_path / "s", model=model, max_length=80, max_unreadable=1.0)
    reasons = read_record(tmp_path / "s").unreadable
    assert "more than --max-length 80" in reasons["x.jsonl:1"]
    assert "says nothing in it" in reasons["x.jsonl:3"]
    assert [row["name"] for row in rows_of(tmp_path / "s")] == ["x.jsonl:2"]


def test_continuous_media_are_refused_by_name(
    talks: Any, tmp_path: Path, new_model: Callable[..., Path]
) -> None:
    both = {**talks.codec, "encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}
    folder = new_model(grid=both)  # an encoder is there, so it reads what users show
    talks.write(tmp_path, 2)
    said = [talks.makes("draw", "1.npy"), talks.shows("0.npy", "yes")]
    path = talks.lines(tmp_path / "x.jsonl", said)
    with pytest.raises(
        DataError, match=r"x.jsonl:2: its grid goes through grid.encoder.*grid.routes: {in: codec"
    ):
        build(talks.table(path), tmp_path / "s", model=folder)
    said[1][0]["content"][0]["route"] = "codec"
    talks.lines(path, said)
    build(talks.table(path), tmp_path / "r", model=folder)
    assert read_record(tmp_path / "r").rows == 2
    talks.lines(path, [talks.shows("0.npy", "yes")])
    build(
        talks.table(path), tmp_path / "t", model=new_model(grid={**both, "routes": {"in": "codec"}})
    )
    assert [span["slot"] for span in rows_of(tmp_path / "t")[0]["spans"]] == ["grid.codec"]


def test_a_data_set_keeps_its_splits(talks: Any, model: Path, tmp_path: Path) -> None:
    source = SourceConfig(kind="dataset", path="standin-grids", options={"size": 30})
    build(source, tmp_path / "s", model=model, limit=7, shard_size=5)
    record = read_record(tmp_path / "s")
    assert record.splits == {"train": 7, "held-out": 7, "unseen": 7}
    assert [shard.rows for shard in record.shards] == [5, 2, 5, 2, 5, 2]
    build(source, tmp_path / "t", model=model, limit=7, shard_size=5, splits=["unseen"])
    assert read_record(tmp_path / "t").splits == {"unseen": 7}
    with pytest.raises(DataError, match="no split 'test'"):
        build(source, tmp_path / "u", model=model, splits=["test"])
    with pytest.raises(UsageError, match="leave --split out"):
        build(talks.table(tmp_path / "x"), tmp_path / "u", model=model, splits=["train"])


def test_a_model_without_text_is_refused(talks: Any, tmp_path: Path, lines: Path) -> None:
    save(*compose({"name": "codec", "grid": talks.codec}), tmp_path / "m")
    with pytest.raises(ConfigError, match="no tokenizer, so conversations have no ids"):
        talks.build(lines, tmp_path / "s", tmp_path / "m")


def test_light_where_it_can_be() -> None:
    code = "import sys, xoron_train.shards.record; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
