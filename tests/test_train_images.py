"""Proves on real images what training on conversations promises: exact resume, accumulation, frozen
towers, a connector that alone moves, a split and a golden set by what images show.

A tiny model of random weights; the images are blocks of random colours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import xoron_core
from tests.training import records, weights
from xoron_train import train

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from PIL import Image  # comes with xoron-vision

from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.recipe import Recipe


def picture(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def says(answer, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": answer},
    ]


def write_lines(path, talks):
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images, a conversation about each, one in four about two, and some text."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        picture(number).save(folder / f"{number}.png")
    talks = [
        says(f"number {n}" + "!" * (n % 9), *[f"{k}.png" for k in ((n, n - 1) if n % 4 else (n,))])
        for n in range(40)
    ]
    write_lines(folder / "talks.jsonl", talks)
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"Line {number} of a text about nothing. " * 9)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    xoron_core.save(
        *xoron_core.compose(
            plugins="llm,vision", preset="tiny", overrides=["backbone.num_layers=2"]
        ),
        folder,
    )
    return folder


@pytest.fixture
def recipe(folder):
    def make(**changes):
        return Recipe.parse(
            {
                "name": "images",
                "mixture": {
                    "talks": {"kind": "conversations", "path": str(folder / "talks.jsonl")},
                    "texts": {"kind": "files", "path": str(folder), "pattern": "*.txt"},
                },
                "eval_fraction": 0.2,
                "sequence_length": 80,
                "shuffle_rows": 4,
                "batch_size": 2,
                "max_steps": 6,
                "learning_rate": 0.01,
                "log_every": 1,
                "tensorboard": False,
                **changes,
            }
        )

    return make


def moved(before, after):
    """Slots of which a tensor changed, and slots of which one did not."""
    changed = {True: set(), False: set()}
    for name, tensor in before.items():
        slot = name.removeprefix("slots.").split(".")[0]
        changed[not torch.equal(tensor, after[name])].add(slot)
    return changed[True], changed[False]


def test_resumed_is_uninterrupted_bit_for_bit(recipe, model, tmp_path):
    chosen = recipe(
        save_every=2,
        eval_every=3,
        gradient_accumulation_steps=2,
        keep_checkpoints=9,
        budgets={"image.projector": "random"},
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(chosen, straight, model=model, quiet=True)
    shutil.copytree(straight, broken)
    for step in (4, 6):
        shutil.rmtree(broken / f"checkpoints/step-{step:08d}")
    shutil.rmtree(broken / "model")
    train(chosen, broken, resume=True, quiet=True)
    assert records(broken) == records(straight)
    expected = weights(straight / "model")
    assert all(torch.equal(t, expected[name]) for name, t in weights(broken / "model").items())
    # Nothing of an image is kept: what is still to come is read anew.
    data = straight / "checkpoints/step-00000004/trainer/data.safetensors"
    assert data.stat().st_size < 64 * 64


def gradient(monkeypatch, recipe, model, run):
    seen = []

    def step(optimizer, closure=None):
        for group in optimizer.param_groups:
            seen.extend(parameter.grad.clone() for parameter in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(recipe, run, model=model, quiet=True)
    return seen


def test_micro_batches_give_the_gradient_of_the_large_batch(recipe, model, tmp_path, monkeypatch):
    common = {"max_steps": 1, "warmup_steps": 0, "eval_fraction": 0.0, "max_grad_norm": None}
    found = {
        size: gradient(
            monkeypatch,
            recipe(batch_size=size, gradient_accumulation_steps=8 // size, **common),
            model,
            tmp_path / str(size),
        )
        for size in (8, 2, 1)
    }
    assert sum(float(g.abs().sum()) for g in found[8]) > 1.0
    for size in (2, 1):
        for large, small in zip(found[8], found[size], strict=True):
            torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def test_a_frozen_tower_stays_bit_for_bit_and_a_trained_one_moves(recipe, model, tmp_path):
    keys = {"max_steps": 50, "weight_decay": 0.5, "eval_fraction": 0.0, "log_every": 50}
    before = weights(model)
    frozen = train(
        recipe(**keys, freeze=["image.encoder"]), tmp_path / "f", model=model, quiet=True
    )
    changed, same = moved(before, weights(frozen.model_folder))
    assert {"image__encoder"} == same
    assert changed == {"backbone", "image__projector"}
    short = {**keys, "max_steps": 2, "log_every": 1}
    free = train(recipe(**short), tmp_path / "t", model=model, quiet=True)
    changed, _ = moved(before, weights(free.model_folder))
    assert "image__encoder" in changed


def test_training_the_connector_changes_the_connector_alone(recipe, model, tmp_path):
    alone = recipe(train=["image.projector"], max_steps=3, eval_fraction=0.0)
    result = train(alone, tmp_path / "run", model=model, quiet=True)
    changed, same = moved(weights(model), weights(result.model_folder))
    assert changed == {"image__projector"}
    assert same == {"backbone", "image__encoder"}


def test_no_image_is_on_both_sides(recipe, model, folder):
    processor = xoron_core.load(model)[1]
    chosen = recipe()
    talks = TalkMixture(chosen, processor)

    def images(conversation):
        parts = conversation.messages[0]["content"]
        return {Path(part["image"]).name for part in parts if part["type"] == "image"}

    sides = {
        split: set().union(*(images(c) for c in talks.samples("talks", split, 99)))
        for split in ("train", "held-out")
    }
    assert len(sides["train"]) > 10
    assert sides["held-out"]
    assert not sides["train"] & sides["held-out"]


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "webp"])
def test_a_golden_image_is_found_under_another_name_and_format(
    recipe, model, tmp_path, folder, suffix
):
    processor = xoron_core.load(model)[1]
    picture(7).save(tmp_path / f"other.{suffix}", lossless=True)
    golden = write_lines(tmp_path / "golden.jsonl", [says("x", f"other.{suffix}")])
    free = TalkMixture(recipe(eval_fraction=0.0), processor)
    kept = TalkMixture(recipe(eval_fraction=0.0, golden=[str(golden)]), processor)
    names = [{c.name for c in talks.samples("talks", "train", 99)} for talks in (free, kept)]
    # Conversations 7 and 8 are lines 8 and 9; line 9 shows image 8 alone, as one in four does.
    shown = {
        f"talks.jsonl:{line}"
        for line, text in enumerate((folder / "talks.jsonl").read_text().splitlines(), 1)
        if '"7.png"' in text
    }
    assert shown
    assert names[0] - names[1] == shown
