"""Proves that migrated shards are what a migrated model makes of the same conversations, and that a
range that is gone or a codec that is another is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xoron_core.api import load, save
from xoron_core.cli import run
from xoron_core.descriptors import TokenGroup
from xoron_core.errors import DataError, TokenSpaceError, UsageError
from xoron_core.migrate import migrate
from xoron_core.tokens.space import CodecRange, TokenSpace
from xoron_train.shards import migrate as module
from xoron_train.shards.audit import audit
from xoron_train.shards.migrate import migrate_shards
from xoron_train.shards.record import RECORD
from xoron_train.shards.rows import read_table


def space_of(model: Path, *, without: int | None = None) -> TokenSpace:
    """The model's space with another codec's range before its own, or without one of its own."""
    old = TokenSpace.load(model)
    codecs = [entry.range for entry in old.codecs if entry.range.codebook != without]
    extra = CodecRange("aaa/other", 0, 5, "other", None, "grid")
    groups = [
        TokenGroup(name, {special.name: special.string for special in members})
        for name, members in old.groups().items()
    ]
    return TokenSpace.allocate(text=old.text, groups=groups, codecs=[extra, *codecs])


@pytest.fixture(scope="module")
def moved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model under that space."""
    folder = tmp_path_factory.mktemp("moved") / "m"
    save(*migrate(*load(model), space_of(model)), folder)
    return folder


def test_migrated_shards_are_those_of_the_migrated_model(
    talks: Any, lines: Path, shards: Path, model: Path, moved: Path, tmp_path: Path
) -> None:
    migrate_shards(shards, moved, tmp_path / "s")
    again = talks.build(lines, tmp_path / "again", moved)
    for file in sorted(shards.glob("*.parquet")):
        ours, fresh = (read_table(folder / file.name) for folder in (tmp_path / "s", again))
        assert ours.equals(fresh)
        assert ours["input_ids"] != read_table(file)["input_ids"]
    records = [json.loads((f / RECORD).read_text()) for f in (tmp_path / "s", again)]
    assert records[0]["settings"] == records[1]["settings"]
    found = audit(tmp_path / "s", model=moved, samples=1000)
    assert all(one.passed for one in found), found


def test_labels_of_media_move_too(model: Path, moved: Path, shards: Path, tmp_path: Path) -> None:
    old, new = TokenSpace.load(model), TokenSpace.load(moved)
    table = read_table(shards / "shard-00000.parquet").slice(0, 2)
    rows = table.to_pylist()
    last = old.range("xoron-standin/grid-codec:1")
    rows[1]["media_labels"] = [{"position": 3, "id": last.start + 2}, {"position": 4, "id": 7}]
    table = type(table).from_pylist(rows, table.schema)
    labels = module._moved(table, module._places(old, new), old, where="x")[
        "media_labels"
    ].to_pylist()
    start = new.range(last.name).start
    assert start != last.start
    assert labels == [[], [{"position": 3, "id": start + 2}, {"position": 4, "id": 7}]]


def test_a_range_that_is_gone_is_refused(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = module.origin(model)._replace(space=space_of(model, without=1))
    monkeypatch.setattr(module, "origin", lambda folder: target)
    with pytest.raises(TokenSpaceError, match=r"lacks xoron-standin/grid-codec:1, which its rows"):
        migrate_shards(shards, model, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_another_codec_is_refused(
    model: Path, moved: Path, shards: Path, tmp_path: Path, new_model: Callable[..., Path]
) -> None:
    loaded, processor = load(moved)
    with torch.no_grad():
        loaded.part("grid.codec").down.bias += 1
    save(loaded, processor, tmp_path / "m")
    with pytest.raises(DataError, match=r"codec in 'grid.codec' is another.*were made with"):
        migrate_shards(shards, tmp_path / "m", tmp_path / "s")
    with pytest.raises(DataError, match=r"codec in 'grid.codec' is missing"):
        migrate_shards(shards, new_model(), tmp_path / "s")


def test_the_command(shards: Path, moved: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    line = ["-q", "tokens", "migrate", str(shards), "--to", str(moved), "-o", str(out)]
    assert run(line) == 0
    migrate_shards(shards, moved, tmp_path / "t")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "t").iterdir()
    }
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        migrate_shards(shards, moved, out)
