"""Proves that training from shards is training on their conversations: the same rows, the same
losses, bit for bit, no codec run; and that shards of another token space are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from xoron_core.api import load, save
from xoron_core.descriptors import resolve
from xoron_core.errors import ConfigError, DataError, TokenSpaceError
from xoron_train.conversation import HELD_OUT, TRAIN
from xoron_train.data.batches import collate
from xoron_train.data.media_feed import MediaFeed
from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.data.talks import Talk
from xoron_train.metrics import read_metrics
from xoron_train.recipe import Recipe
from xoron_train.run import train
from xoron_train.shards.source import ShardSource


def both(lines: Path, shards: Path) -> dict[str, dict[str, Any]]:
    """The same conversations as a table and as shards."""
    return {
        "table": {"kind": "conversations", "path": str(lines)},
        "shards": {"kind": "shards", "path": str(shards)},
    }


@pytest.fixture
def mixture(
    model: Path, lines: Path, shards: Path, new_recipe: Callable[..., Recipe]
) -> TalkMixture:
    recipe = new_recipe(mixture=both(lines, shards), eval_fraction=0.3, sequence_length=400)
    return TalkMixture(recipe, load(model)[1])


def training(mixture: TalkMixture, name: str) -> dict[str, Talk]:
    """The training rows of a source by their names."""
    source = mixture.training[name]
    found = [source.read(index) for index in range(len(source))]
    return {talk.name: talk for talk in found if talk.on == TRAIN}


def test_losses_are_those_of_the_conversations(mixture: TalkMixture, model: Path) -> None:
    loaded, processor = load(model)
    fresh, stored = training(mixture, "table"), training(mixture, "shards")
    assert set(fresh) == set(stored)
    assert len(fresh) > 15
    for names in (list(fresh)[:4], list(fresh)[4:12], list(fresh)[-3:]):
        batches = [
            collate([talks[name] for name in names], processor, pad_token_id=0)
            for talks in (fresh, stored)
        ]
        assert "media" in batches[0]
        assert "media" not in batches[1]
        counts = [loaded.loss_counts(batch)["text"] for batch in batches]
        first, second = (loaded(**batch, use_cache=False).losses["text"] for batch in batches)
        assert torch.equal(first.sum, second.sum)
        assert torch.equal(first.count, second.count)
        assert float(counts[0]) == float(counts[1]) == float(first.count) > 0


def test_labels_of_media_are_kept(
    talks: Any, model: Path, tmp_path: Path, new_recipe: Callable[..., Recipe]
) -> None:
    path = talks.write(tmp_path / "t", 1)
    talk, size = talks.shows("0.npy", "yes"), 2 * len(np.load(tmp_path / "t" / "0.npy"))
    talk[0]["content"][0]["labels"] = list("abcdefghij"[:size])
    talks.lines(path, [talk])
    shards = talks.build(path, tmp_path / "s", model, eval_fraction=0.0)
    recipe = new_recipe(mixture=both(path, shards), eval_fraction=0.0, sequence_length=400)
    processor = load(model)[1]
    mixture = TalkMixture(recipe, processor)
    fresh, stored = (
        collate(list(training(mixture, name).values()), processor, pad_token_id=0)["media_labels"]
        for name in both(path, shards)
    )
    assert torch.equal(fresh, stored)
    assert int((stored >= 0).sum()) == size > 1


def test_held_out_rows_are_those_of_the_conversations(mixture: TalkMixture) -> None:
    table, shards = ({talk.name for talk in mixture.held_out(n)} for n in ("table", "shards"))
    assert table == shards
    assert len(table) > 3
    assert all(talk.on == HELD_OUT for talk in mixture.held_out("shards"))
    with pytest.raises(ConfigError, match=r"mixture.shards: holds ids.*needs conversations"):
        mixture.samples("shards", TRAIN, 3)


def test_a_run_from_shards_is_the_run_from_conversations(
    talks: Any,
    model: Path,
    lines: Path,
    tmp_path: Path,
    new_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = talks.build(lines, tmp_path / "s", model, eval_fraction=0.0)
    losses = {}
    for kind, source in both(lines, shards).items():
        # The order of a source depends on its name and length, so both stand under one name.
        recipe = new_recipe(
            mixture={"talks": source}, eval_fraction=0.0, sequence_length=400, max_steps=4
        )
        if kind == "shards":
            monkeypatch.setattr(resolve("standin_media:GridCodec"), "encode", None)
        train(recipe, tmp_path / kind, model=model, quiet=True)
        records = read_metrics(tmp_path / kind / "metrics.jsonl")
        losses[kind] = [record["loss"] for record in records if "loss" in record]
    assert losses["table"] == losses["shards"]
    assert len(set(losses["table"])) == 4


def test_another_token_space_is_refused(
    shards: Path, model: Path, new_model: Callable[..., Path], new_recipe: Callable[..., Recipe]
) -> None:
    other = load(new_model(grid={"codec": {"use": "standin-grid", "levels": 9}}))[1]
    recipe = new_recipe(mixture={"s": {"kind": "shards", "path": str(shards)}})
    with pytest.raises(TokenSpaceError) as error:
        TalkMixture(recipe, other)
    assert other.space.hash in str(error.value)
    assert load(model)[1].space.hash in str(error.value)


def test_other_weights_of_a_codec_are_refused(
    shards: Path, model: Path, tmp_path: Path, new_recipe: Callable[..., Recipe]
) -> None:
    loaded, processor = load(model)
    with torch.no_grad():
        loaded.part("grid.codec").up.bias[0] += 1e-3
    save(loaded, processor, tmp_path / "m")
    recipe = new_recipe(mixture={"s": {"kind": "shards", "path": str(shards)}}, eval_fraction=0.0)
    with pytest.raises(DataError, match=r"mixture.s: its ids were made with sha256:.*has sha256:"):
        train(recipe, tmp_path / "run", model=tmp_path / "m", quiet=True)
    with torch.no_grad():
        loaded.backbone.model.head.weight += 1.0  # what is trained may be any
        loaded.part("grid.codec").up.bias.copy_(load(model)[0].part("grid.codec").up.bias)
    TalkMixture(recipe, processor).require_codecs(loaded)


def test_golden_media_are_kept_out_of_training(
    talks: Any, model: Path, lines: Path, shards: Path, new_recipe: Callable[..., Recipe]
) -> None:
    recipe = new_recipe(mixture=both(lines, shards), eval_fraction=0.3, sequence_length=400)
    golden = talks.lines(lines.parent / "golden.jsonl", [talks.shows("8.npy", "?")])
    processor = load(model)[1]
    without = TalkMixture(recipe, processor)
    assert "talks.jsonl:9" in training(without, "shards")
    kept = TalkMixture(recipe.model_copy(update={"golden": (str(golden),)}), processor)
    assert set(training(kept, "table")) == set(training(kept, "shards"))
    assert set(training(without, "shards")) - set(training(kept, "shards")) == {"talks.jsonl:9"}


def test_what_learns_from_media_alone_refuses_ids(
    shards: Path, model: Path, new_recipe: Callable[..., Recipe]
) -> None:
    recipe = new_recipe(mixture={"s": {"kind": "shards", "path": str(shards)}})
    loaded, processor = load(model)
    with pytest.raises(ConfigError, match=r"mixture.s: holds ids, and grid.codec learns from"):
        MediaFeed(
            recipe, loaded, processor=processor, accelerator=Accelerator(), slots=["grid.codec"]
        )


def test_rows_that_are_too_long_are_named(shards: Path, model: Path) -> None:
    space = load(model)[1].space
    source = ShardSource("s", shards, space=space, wanted=TRAIN, length=20)
    unread = [item for item in source.walk(range(len(source))) if not isinstance(item, Talk)]
    assert unread
    assert all("more than sequence_length=20" in item.reason for item in unread)
    assert all(item.name.startswith("talks.jsonl:") for item in unread)


def test_incomplete_shards_are_refused(shards: Path, model: Path, tmp_path: Path) -> None:
    space = load(model)[1].space
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    shutil.copy(copy / "shard-00000.parquet", copy / "shard-00001.parquet")
    with pytest.raises(DataError, match="run: xoron tokens audit"):
        ShardSource("s", copy, space=space, wanted=TRAIN, length=400)
    (copy / "shard-00001.parquet").unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        ShardSource("s", copy, space=space, wanted=TRAIN, length=400)
