"""Proves that each check of an audit finds the fault it is for, and that no other check does.

A fault is put into a copy of sound shards, whose record is then made true again, so that nothing
but the fault is wrong. Sound shards pass everything.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xoron_core.api import load, save
from xoron_core.cli import run
from xoron_core.descriptors import resolve
from xoron_core.tokens.space import TokenSpace
from xoron_train.data.config import SourceConfig
from xoron_train.shards.audit import audit
from xoron_train.shards.build import build
from xoron_train.shards.record import RECORD, file_hash
from xoron_train.shards.rows import SCHEMA, read_table, write_table

Rows = list[dict[str, Any]]
ALL = {
    "files", "token-space", "shapes", "ids", "grammar", "splits", "lengths", "duplicates",
    "tokenizer", "codecs", "retokenise", "decode",
}  # fmt: skip


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards that may be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def inject(folder: Path, change: Callable[[Rows], None], *, shard: int = 0) -> None:
    """Changes the rows of one shard and makes the record true again."""
    record = json.loads((folder / RECORD).read_text())
    path = folder / record["shards"][shard]["file"]
    table = read_table(path)
    rows = table.to_pylist()
    change(rows)
    write_table(path, pa.Table.from_pylist(rows, SCHEMA.with_metadata(table.schema.metadata)))
    record["shards"][shard] |= {"sha256": file_hash(path), "rows": len(rows)}
    every = [r for s in record["shards"] for r in read_table(folder / s["file"]).to_pylist()]
    record["splits"] = dict(Counter(row["split"] for row in every))
    record["positions"] = sum(len(row["input_ids"]) for row in every)
    (folder / RECORD).write_text(json.dumps(record))


def failed(folder: Path, **keys: Any) -> dict[str, str]:
    """Detail by check, of those that fail."""
    return {one.check: one.detail for one in audit(folder, **keys) if one.passed is False}


def coded(rows: Rows, *, made: bool | None = None) -> dict[str, Any]:
    """The first row with a medium of several frames."""
    return next(
        row
        for row in rows
        for span in row["spans"][:1]
        if span["length"] > 4 and made in (None, span["made"])
    )


def test_sound_shards_pass_everything(shards: Path, model: Path) -> None:
    found = {one.check: one for one in audit(shards, model=model, samples=1000)}
    assert set(found) == ALL
    assert all(one.passed for one in found.values()), found
    assert found["retokenise"].detail.startswith("37 conversations")
    media = sum(
        len(r["spans"]) for f in shards.glob("*.parquet") for r in read_table(f).to_pylist()
    )
    assert found["decode"].detail == f"{media} media"
    without = {one.check for one in audit(shards) if one.passed is None}
    assert without == {"tokenizer", "codecs", "retokenise", "decode"}


def test_several_splits_of_a_data_set_pass_everything(model: Path, tmp_path: Path) -> None:
    source = SourceConfig(kind="dataset", path="standin-grids", options={"size": 30})
    build(source, tmp_path / "s", model=model, limit=9, shard_size=4, batch_size=3)
    found = {one.check: one for one in audit(tmp_path / "s", model=model, samples=1000)}
    assert all(one.passed for one in found.values()), found
    assert found["retokenise"].detail.startswith("27 conversations")


def other_bytes(folder: Path) -> None:
    path = folder / "shard-00001.parquet"
    pq.write_table(read_table(path), path, compression="gzip")


def lost(folder: Path) -> None:
    (folder / "shard-00001.parquet").unlink()


def torn(folder: Path) -> None:
    path = folder / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def miscounted(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "positions": record["positions"] + 1}))


def of_another_build(folder: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["max_length"] = 4096

    path, record = folder / "shard-00000.parquet", json.loads((folder / RECORD).read_text())
    table = read_table(path)
    about = json.loads(table.schema.metadata[b"xoron"])
    change(about["settings"])
    metadata = {b"xoron": json.dumps(about).encode()}
    write_table(path, table.replace_schema_metadata(metadata))
    record["shards"][0]["sha256"] = file_hash(path)
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("fault", [other_bytes, lost, torn, miscounted, of_another_build])
def test_files(copy: Path, fault: Callable[[Path], None]) -> None:
    fault(copy)
    assert set(failed(copy)) == {"files"}


def test_another_token_space(copy: Path, model: Path, new_model: Callable[..., Path]) -> None:
    other = new_model(grid={"codec": {"use": "standin-grid", "levels": 9}})
    found = failed(copy, model=other)["token-space"]
    assert TokenSpace.load(model).hash in found
    assert TokenSpace.load(other).hash in found
    shutil.copy(other / "token_space.json", copy)
    assert set(failed(copy)) == {"token-space"}
    (copy / "token_space.json").unlink()
    assert set(failed(copy)) == {"token-space"}


def test_another_tokenizer(shards: Path, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "m"))
    template = other / "chat_template.jinja"
    template.write_text("{#- another template with the same result -#}" + template.read_text())
    assert set(failed(shards, model=other)) == {"tokenizer"}


def test_other_weights_of_a_codec(shards: Path, model: Path, tmp_path: Path) -> None:
    loaded, processor = load(model)
    with torch.no_grad():
        loaded.part("grid.codec").up.weight[0, 0] += 1e-3  # which encoding does not use
    save(loaded, processor, tmp_path / "m")
    assert set(failed(shards, model=tmp_path / "m")) == {"codecs"}


def short_mask(rows: Rows) -> None:
    rows[3]["learned"].pop()


def span_beyond(rows: Rows) -> None:
    row = coded(rows)
    row["spans"].append({**row["spans"][-1], "start": len(row["input_ids"]) - 1})
    row["input_ids"][row["spans"][0]["start"]] = -1  # and so no matter of the grammar


def label_beyond(rows: Rows) -> None:
    rows[0]["media_labels"] = [{"position": len(rows[0]["input_ids"]), "id": 1}]


@pytest.mark.parametrize(
    ("fault", "others"), [(short_mask, set()), (span_beyond, {"ids"}), (label_beyond, set())]
)
def test_shapes(copy: Path, fault: Callable[[Rows], None], others: set[str]) -> None:
    inject(copy, fault)
    assert set(failed(copy)) == {"shapes"} | others


@pytest.mark.parametrize("number", [-1, 10**6, "label"])
def test_ids(copy: Path, number: int | str) -> None:
    def change(rows: Rows) -> None:
        if number == "label":
            rows[2]["media_labels"] = [{"position": 0, "id": 10**6}]
        else:
            rows[2]["input_ids"][4] = number

    inject(copy, change, shard=1)
    assert set(failed(copy)) == {"ids"}


def no_end(rows: Rows) -> None:
    row = coded(rows)
    end = row["spans"][0]["start"] + row["spans"][0]["length"]
    assert len(row["spans"]) == 1
    del row["input_ids"][end], row["learned"][end]


def exchanged_codebooks(rows: Rows) -> None:
    row = coded(rows)
    at, ids = row["spans"][0]["start"] + 1, row["input_ids"]
    ids[at], ids[at + 1] = ids[at + 1], ids[at]
    # With a delay of 1 the first id is codebook 0's, then come 0 and 1 in turn.


def shifted_span(rows: Rows) -> None:
    span = coded(rows)["spans"][0]
    span |= {"start": span["start"] + 1, "length": span["length"] - 1}


def other_direction(rows: Rows) -> None:
    span = coded(rows)["spans"][0]
    span["made"] = not span["made"]


def code_in_text(rows: Rows) -> None:
    row = coded(rows)
    row["input_ids"][row["spans"][0]["start"] - 2] = row["input_ids"][row["spans"][0]["start"]]


@pytest.mark.parametrize(
    "fault", [no_end, exchanged_codebooks, shifted_span, other_direction, code_in_text]
)
def test_grammar(copy: Path, fault: Callable[[Rows], None]) -> None:
    inject(copy, fault)
    assert set(failed(copy)) == {"grammar"}


def moved(rows: Rows) -> None:
    row = next(row for row in rows if row["split"] == "train" and row["number"] == 0)
    row["split"] = "held-out"


def leaked(rows: Rows) -> None:
    train = next(row for row in rows if row["split"] == "train" and row["spans"])
    other = next(row for row in rows if row["split"] == "held-out" and row["spans"])
    train["spans"][0]["medium"] = other["spans"][0]["medium"]


@pytest.mark.parametrize("fault", [moved, leaked])
def test_splits(copy: Path, fault: Callable[[Rows], None]) -> None:
    inject(copy, fault)
    assert set(failed(copy)) == {"splits"}


def test_splits_of_a_data_set_that_leaks(copy: Path) -> None:
    """It brings its splits, so nothing but a medium in two of them is wrong."""
    record = json.loads((copy / RECORD).read_text())
    for shard in record["shards"]:
        path = copy / shard["file"]
        table = read_table(path)
        about = json.loads(table.schema.metadata[b"xoron"])
        about["settings"]["eval_fraction"] = None
        write_table(path, table.replace_schema_metadata({b"xoron": json.dumps(about).encode()}))
        shard["sha256"] = file_hash(path)
    record["settings"]["eval_fraction"] = None
    (copy / RECORD).write_text(json.dumps(record))
    assert not failed(copy)
    inject(copy, leaked)
    assert set(failed(copy)) == {"splits"}


def test_lengths(copy: Path) -> None:
    longest = max(
        len(r["input_ids"]) for f in copy.glob("*.parquet") for r in read_table(f).to_pylist()
    )
    assert not failed(copy, max_length=longest)
    assert set(failed(copy, max_length=longest - 1)) == {"lengths"}

    def emptied(rows: Rows) -> None:
        rows[0] |= {"input_ids": [], "learned": [], "spans": []}

    inject(copy, emptied)
    assert set(failed(copy)) == {"lengths"}


def test_duplicates(copy: Path) -> None:
    def repeated(rows: Rows) -> None:
        rows += [{**rows[0], "name": f"again {n}", "number": 1000 + n} for n in range(3)]

    inject(copy, repeated)
    assert set(failed(copy)) == {"duplicates"}
    assert "3 of 40 rows (7.50%" in failed(copy)["duplicates"]
    assert not failed(copy, max_duplicates=0.1)


def another_word(rows: Rows) -> None:
    row = next(row for row in rows if not row["spans"])
    at = row["learned"].index(True)
    row["input_ids"][at] += 1


def another_code(rows: Rows) -> None:
    row = coded(rows)
    at = row["spans"][0]["start"]
    row["input_ids"][at] += 1 if row["input_ids"][at - 1] else -1


def learned_more(rows: Rows) -> None:
    rows[0]["learned"][0] = not rows[0]["learned"][0]


def dropped(rows: Rows) -> None:
    rows.pop()


@pytest.mark.parametrize("fault", [another_word, learned_more, dropped])
def test_retokenise(copy: Path, model: Path, fault: Callable[[Rows], None]) -> None:
    inject(copy, fault)
    assert set(failed(copy, model=model, samples=1000)) == {"retokenise"}


def test_retokenise_samples_whole_blocks_and_needs_the_source(
    copy: Path, model: Path, lines: Path, tmp_path: Path
) -> None:
    found = {one.check: one.detail for one in audit(copy, model=model, samples=6)}
    assert 5 <= int(found["retokenise"].split()[0]) <= 10  # two blocks of five, some left out
    moved = Path(shutil.copytree(lines.parent, tmp_path / "moved"))
    assert not failed(copy, model=model, source=str(moved / lines.name))
    with (moved / lines.name).open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "new"}]}\n')
    found = failed(copy, model=model, source=str(moved / lines.name))
    assert set(found) == {"retokenise"}
    assert "have changed since they were tokenised" in found["retokenise"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda media: torch.cat([media, media[:, :1]], 1), "decodes to one of"),
        (lambda media: media / 0, "not finite"),
    ],
)
def test_decode(
    shards: Path, model: Path, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = resolve("standin_media:GridCodec")
    right = codec.decode
    monkeypatch.setattr(codec, "decode", lambda self, ids, data: change(right(self, ids, data)))
    found = failed(shards, model=model)
    assert set(found) == {"decode"}
    assert message in found["decode"]


def test_metadata_that_do_not_decode(copy: Path, model: Path) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            for span in row["spans"]:
                span["metadata"] = '{"spread": NaN}'

    inject(copy, change)
    assert set(failed(copy, model=model, samples=1000)) == {"decode", "retokenise"}


def test_the_commands(
    copy: Path,
    model: Path,
    lines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "s"
    monkeypatch.chdir(lines.parent)
    line = ["-q", "tokens", "build", lines.name, "-o", str(out), "--model", str(model)]
    assert run([*line, "--eval-fraction", "0.3", "--json"]) == 0
    monkeypatch.chdir(tmp_path)  # the audit finds the table all the same
    said = json.loads(capsys.readouterr().out)
    assert said["splits"] == json.loads((copy / RECORD).read_text())["splits"]
    assert run(["tokens", "audit", str(out), "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    inject(copy, another_code)
    assert run(["tokens", "audit", str(copy)]) == 0
    assert run(["tokens", "audit", str(copy), "--model", str(model), "--samples", "99"]) == 1
    table = capsys.readouterr().out
    assert "retokenise   FAILED" in table
    assert "grammar      ok" in table
    assert run(["tokens", "audit", str(tmp_path)]) == 1
    assert "holds no complete shards" in capsys.readouterr().err


def test_a_data_set_at_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, end = tmp_path / "s", ["--model", str(model), "--limit", "4"]
    line = ["-q", "tokens", "build", "standin-grids", "-o", str(out), *end]
    assert run([*line, "--set", "size=9", "--split", "train"]) == 0
    assert "splits: train 4" in capsys.readouterr().out
    assert run([*line, "--field", "x"]) == 2
    assert "--field names a column" in capsys.readouterr().err
    assert run(["tokens", "build", "standin-grid", "-o", str(out), *end]) == 2
    assert "Did you mean 'standin-grids'" in capsys.readouterr().err
