"""Proves what a metrics record holds, that bits per byte are what they say, and that the file can
be cut back to any step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xoron_core.api import load
from xoron_train import train
from xoron_train.data.packing import Packer, collate
from xoron_train.data.stream import held_out_texts, token_bytes
from xoron_train.metrics import MetricsLog, read_metrics
from xoron_train.recipe import Recipe

_TRAIN = {
    "kind",
    "step",
    "tokens",
    "loss",
    "losses",
    "bits_per_byte",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "elapsed_seconds",
}
_EVAL = {"kind", "step", "loss", "bits_per_byte", "tokens", "bytes"}


def test_records_have_their_keys_and_add_up(
    model_folder: Path, new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = new_recipe(eval_every=4, gradient_accumulation_steps=3, tensorboard=True)
    train(recipe, tmp_path / "run", model=model_folder, quiet=True)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    kinds = [(r["kind"], r["step"]) for r in records]
    before = [("train", step) for step in range(1, 5)]
    assert kinds == [*before, ("eval", 4), ("train", 5), ("train", 6), ("eval", 6)]
    for record in records:
        assert record.keys() == (_TRAIN if record["kind"] == "train" else _EVAL)
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["tokens"] for r in trained] == [step * 2 * 3 * 32 for step in range(1, 7)]
    assert [r["learning_rate"] for r in trained][:2] == [0.005, 0.01]
    assert all(r["loss"] == r["losses"]["text"] > 0 for r in trained)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_held_out_bits_per_byte_are_those_of_the_documents_apart(
    new_model: Callable[..., Path], new_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    # One row holds all that is held out, so no document is continued with less context.
    recipe = new_recipe(sequence_length=2048)
    result = train(recipe, tmp_path / "run", model=new_model(dropout=0.0), quiet=True)
    model, processor = load(result.model_folder)
    tokenizer = processor.tokenizer
    nats, size = 0.0, 0
    for text in held_out_texts(recipe, "words"):
        size += len(text.encode())
        packer = Packer(2048)
        ids = [tokenizer.bos_token_id, *processor.encode_text(text), tokenizer.eos_token_id]
        packer.add(ids)
        with torch.no_grad():
            batch = collate(list(packer.drain()), pad_token_id=tokenizer.pad_token_id)
            nats += float(model(**batch).losses["text"].sum)
    assert result.evaluation["bytes"] == size
    expected = nats / size / math.log(2)
    assert result.evaluation["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_each_source_is_scored_and_the_total_is_theirs(
    model_folder: Path, new_recipe: Callable[..., Recipe], corpus: Path, tmp_path: Path
) -> None:
    mixture = {
        name: {"kind": "files", "path": str(corpus), "pattern": pattern}
        for name, pattern in (("few", "[01]*.txt"), ("more", "[23]*.txt"))
    }
    result = train(new_recipe(mixture=mixture), tmp_path / "run", model=model_folder, quiet=True)
    parts = result.evaluation["sources"]
    assert parts.keys() == {"few", "more"}
    assert result.evaluation["tokens"] == sum(part["tokens"] for part in parts.values())
    nats = sum(part["loss"] * part["tokens"] for part in parts.values())
    assert result.evaluation["loss"] == pytest.approx(nats / result.evaluation["tokens"])


def test_token_bytes_sum_to_the_texts_size(model_folder: Path) -> None:
    _, processor = load(model_folder)
    sizes = token_bytes(processor.tokenizer, processor.space.size)
    assert sizes is not None
    for text in ("plain", "\u00e4\u4e16\U0001f30d\0", "<|eos|>"):
        assert int(sizes[processor.encode_text(text)].sum()) == len(text.encode())
    assert int(sizes[256:].sum()) == 0


def test_the_file_is_cut_back_to_a_step_even_with_a_torn_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, after=0, last=9, tensorboard=False)
    for step in range(1, 6):
        log.write({"kind": "train", "step": step, "loss": 1.0})
    log.write({"kind": "eval", "step": 3, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    MetricsLog(tmp_path, after=3, last=9, tensorboard=False).close()
    kept = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [("train", 1), ("train", 2), ("train", 3), ("eval", 3)]
    # The last evaluation is made anew.
    MetricsLog(tmp_path, after=3, last=3, tensorboard=False).close()
    assert [r["kind"] for r in read_metrics(tmp_path / "metrics.jsonl")] == ["train"] * 3
