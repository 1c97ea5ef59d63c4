"""Proves that recipes train new vocabulary rows apart: old rows stay bit for bit under weight
decay, only new rows have optimizer state, a resumed run is the uninterrupted one, and what a run
leaves makes the trained model of its base; beside an adapter, and before everything trains.

Images are sixteen ids each, of a codec of random weights.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import xoron_core
from tests.training import records, train_in_two_processes, weights
from xoron_core import origins
from xoron_core.errors import ConfigError, TokenSpaceError
from xoron_core.losses import codec_ranges
from xoron_core.media import write_codes
from xoron_core.rows import draw_rows, new_rows
from xoron_core.storage import read_tensors
from xoron_train import train

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image  # comes with xoron-vision

from xoron_train import load_recipe
from xoron_train.data.feed import Feed
from xoron_train.lora import load_adapter
from xoron_train.recipe import Recipe

CODEBOOK = "xoron-vision/vq-image:0"
CODEC = {
    "use": "vq-image",
    "preset": "tiny",
    "image_size": 16,
    "codebook_size": 32,
}
LORA = {"r": 2, "alpha": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four conversations in which images are asked about and asked for, and some text."""
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(folder / f"{number}.png")
        image = [{"type": "image", "image": f"{number}.png"}]
        sides = [image, f"number {number}"]
        asked, said = sides if number % 2 else reversed(sides)
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    (folder / "talks.jsonl").write_text("".join(lines))
    texts = [json.dumps({"text": f"line {n} of a text about nothing. " * 4}) for n in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    return folder


@pytest.fixture(scope="module")
def new_model(tmp_path_factory):
    """Composes a model folder over which an adapter may train, tied or not."""

    def make(*, tied=False, dtype=torch.float32, codec=CODEC):
        declared = {
            "name": "m",
            "tokenizer": {"use": "byte"},
            "backbone": {
                "use": "xoron-moe",
                "preset": "tiny",
                "num_layers": 2,
                "hidden_size": 48,
                "tie_word_embeddings": tied,
            },
            "tokens": {"groups": ["control", "conversation"]},
        }
        image = {"image": {"codec": codec}} if codec else {}
        model, processor = xoron_core.compose(declared | image)
        origins.record(model.config, ["backbone"], "trained")  # of random weights, in truth
        folder = tmp_path_factory.mktemp("model") / "m"
        xoron_core.save(model.to(dtype), processor, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def base(new_model):
    return new_model()


@pytest.fixture
def recipe(folder):
    def make(**changes):
        return Recipe.parse(
            {
                "name": "rows",
                "mixture": {
                    "talks": {"kind": "conversations", "path": str(folder / "talks.jsonl")}
                },
                "rows": {"start": "mean"},
                "eval_fraction": 0.2,
                "sequence_length": 160,
                "batch_size": 2,
                "max_steps": 4,
                "learning_rate": 0.01,
                "weight_decay": 0.1,
                "log_every": 1,
                "tensorboard": False,
                **changes,
            }
        )

    return make


def changed(before, after):
    """Names of the tensors that are not the same bits."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def vocabulary(names):
    return {name for name in names if name.endswith(("embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_and_only_new_rows_have_state(recipe, new_model, tmp_path, tied):
    model = new_model(tied=tied)
    run = tmp_path / "run"
    train(recipe(max_steps=12, save_every=6, keep_checkpoints=9), run, model=model, quiet=True)
    opened, _ = xoron_core.load(model)
    new, before, after = new_rows(opened), opened.state_dict(), weights(run / "model")
    assert new[0] == 256
    assert len(new) > 32
    moved = changed(before, after)
    assert moved == vocabulary(before)
    for name in moved:
        rows = (before[name] != after[name]).any(1).nonzero().flatten()
        assert torch.equal(rows, new), name
    early, late = (run / f"checkpoints/step-{step:08d}" for step in (6, 12))
    one, two = (read_tensors(folder / "trainer/rows.safetensors") for folder in (early, late))
    assert len(two) == (1 if tied else 2)
    going_on = {name: (two[name] != one[name]).any(1) for name in two}
    assert all(rows.any() for rows in going_on.values())
    assert all(rows.all() for name, rows in going_on.items() if tied or "lm_head" in name)
    state = read_tensors(late / "trainer/optimizer.safetensors")
    assert {key.rpartition("/")[0] for key in state} == two.keys()
    numbers = sum(tensor.numel() for tensor in state.values() if tensor.ndim)
    assert numbers == 2 * len(two) * len(new) * 48  # two averages of AdamW
    files = [folder / "slots/image.codec-00001.safetensors" for folder in (early, late)]
    assert len({file.stat().st_ino for file in files}) == 1
    assert changed(weights(late), after) == set()  # no link to what an earlier checkpoint held
    again, _ = xoron_core.load(model)
    xoron_core.load_rows(again, run / "rows")
    assert changed(again.state_dict(), after) == set()


@pytest.fixture
def any_precision():
    """accelerate keeps the first precision of a process, and a run has a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"precision": "bf16"}])
@pytest.mark.usefixtures("any_precision")
def test_resumed_is_uninterrupted_bit_for_bit(recipe, new_model, tmp_path, changes):
    half = "precision" in changes
    model = new_model(dtype=torch.bfloat16 if half else torch.float32)
    chosen = recipe(save_every=2, eval_every=2, keep_checkpoints=9, **changes)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(chosen, straight, model=model, quiet=True)
    shutil.copytree(straight, broken)
    left = (
        "checkpoints/step-00000004",
        "model",
        "rows",
        *(["adapter"] if "lora" in changes else []),
    )
    for gone in left:
        shutil.rmtree(broken / gone)
    train(chosen, broken, resume=True, quiet=True)
    assert records(broken) == records(straight)
    assert changed(weights(straight / "model"), weights(broken / "model")) == set()
    for file in ("rows/trainable_rows.safetensors", "rows/trainable_rows.json"):
        assert (broken / file).read_bytes() == (straight / file).read_bytes()
    rows = read_tensors(straight / "checkpoints/step-00000004/trainer/rows.safetensors")
    assert {tensor.dtype for tensor in rows.values()} == {torch.float32}
    rounded = [not torch.equal(tensor, tensor.bfloat16().float()) for tensor in rows.values()]
    assert all(rounded)  # which a bf16 model folder could not have brought back


def test_rows_and_adapter_over_their_base_make_the_trained_model(recipe, base, tmp_path):
    run = tmp_path / "run"
    train(recipe(lora=LORA, max_steps=6), run, model=base, quiet=True)
    before, after = weights(base), weights(run / "model")
    adapted = changed(before, after) - vocabulary(before)
    assert adapted
    assert all("proj" in name for name in adapted)
    model, _ = xoron_core.load(base)
    xoron_core.load_rows(model, run / "rows")
    over = changed(before, model.state_dict())
    assert over == vocabulary(before)
    load_adapter(model, run / "adapter").remove(merge=True)
    assert changed(model.state_dict(), after) == set()
    unmerged = recipe(lora={**LORA, "merge": False}, max_steps=6)
    train(unmerged, tmp_path / "apart", model=base, quiet=True)
    assert changed(before, weights(tmp_path / "apart/model")) == vocabulary(before)


def test_rows_start_as_the_recipe_says(recipe, base, tmp_path):
    # Steps too small to change a number leave the rows as they were drawn.
    still = {"max_steps": 1, "learning_rate": 1e-30, "seed": 5}
    found = {}
    for name, rows in {
        "mean": {"start": "mean", "noise": 0.2},
        "text": {"start": "text", "descriptions": {CODEBOOK: "colour"}},
        "keep": {"start": "keep"},
    }.items():
        train(recipe(rows=rows, **still), tmp_path / name, model=base, quiet=True)
        found[name] = weights(tmp_path / name / "model")
    assert changed(weights(base), found["keep"]) == set()
    model, processor = xoron_core.load(base)
    draw_rows(model, processor, noise=0.2, seed=5)
    assert changed(model.state_dict(), found["mean"]) == set()
    draw_rows(model, processor, descriptions={CODEBOOK: "colour"}, seed=5)
    assert changed(model.state_dict(), found["text"]) == set()
    assert changed(found["text"], found["mean"]) == vocabulary(found["mean"])


def test_legal_takes_the_loss_over_the_ids_of_a_codebook(recipe, base, tmp_path):
    still = {"max_steps": 1, "learning_rate": 1e-30, "rows": {"start": "keep"}}
    logged, computed = {}, {}
    for legal in (True, False):
        chosen = recipe(legal=legal, **still)
        train(chosen, tmp_path / str(legal), model=base, quiet=True)
        logged[legal] = [record["loss"] for record in records(tmp_path / str(legal))]
        model, processor = xoron_core.load(base)
        feed = Feed(chosen, model, processor=processor, accelerator=Accelerator())
        (batch,) = feed.batches(feed.window(0))
        computed[legal] = by_hand(model.train(), batch, legal=legal)
    assert logged[True][0] == pytest.approx(computed[True], rel=1e-5)
    assert logged[False][0] == pytest.approx(computed[False], rel=1e-5)
    assert logged[True][0] < logged[False][0] - 0.1
    assert logged[True][1] < logged[False][1] - 0.1  # the held-out loss


@torch.no_grad()
def by_hand(model, batch, *, legal):
    """The mean loss of a batch from all its logits, -inf where a codec's id may not stand."""
    ((start, stop),) = codec_ranges(model.space)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    # A codec's ids stand in labels as placeholders until the forward pass writes them.
    _, labels = write_codes(model, batch["media"], batch["input_ids"], batch["labels"])
    labels = labels[:, 1:]
    inside = (labels >= start) & (labels < stop)
    assert inside.any()
    ids = torch.arange(logits.shape[-1])
    illegal = inside[..., None] & ((ids < start) | (ids >= stop))
    if legal:
        logits = logits.masked_fill(illegal, float("-inf"))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def test_mixed_trains_all_but_the_codec_and_splits_nothing(folder, base, tmp_path):
    paths = [f"mixture.media.path={folder / 'talks.jsonl'}",
             f"mixture.text.path={folder / 'texts.jsonl'}"]  # fmt: skip
    run = tmp_path / "run"
    train(load_recipe("mixed", [*paths, *SHORT]), run, model=base, quiet=True)
    before, after = weights(base), weights(run / "model")
    moved = changed(before, after)
    assert {name.split(".")[1] for name in moved} == {"backbone"}
    assert vocabulary(before) < moved
    first = read_tensors(run / "checkpoints/step-00000002/trainer/optimizer.safetensors")
    assert all("backbone" in name for name in first)
    assert not (run / "rows").exists()
    for gone in ("model", "checkpoints/step-00000003"):
        shutil.rmtree(run / gone)
    train(load_recipe("mixed", [*paths, *SHORT]), run, resume=True, quiet=True)
    assert changed(after, weights(run / "model")) == set()


@pytest.mark.slow
def test_two_processes_equal_one(recipe, base, tmp_path):
    keys = {"batch_size": 2, "max_steps": 3, "lora": {**LORA, "dropout": 0.0}}
    two, one = tmp_path / "two", tmp_path / "one"
    train_in_two_processes(recipe(**keys), two, model=base)
    train(recipe(**keys, gradient_accumulation_steps=2), one, model=base, quiet=True)
    pairs = list(zip(records(two), records(one), strict=True))
    assert len(pairs) == 4
    for record, expected in pairs:
        assert record["tokens"] == expected["tokens"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    before, after = weights(base), weights(two / "model")
    assert vocabulary(before) < changed(before, after)


SHORT = ["max_steps=3", "batch_size=2", "gradient_accumulation_steps=1", "sequence_length=160",
         "warmup_ratio=0.0", "eval_fraction=0.2", "tensorboard=false", "save_every=2",
         "weight_decay=0.5", "log_every=1"]  # fmt: skip


def test_the_shipped_stages_follow_each_other(folder, base, tmp_path):
    with pytest.raises(ConfigError, match=r"mixture\.media\.path is not set; .*--set mixture"):
        load_recipe("rows")
    data = f"mixture.media.path={folder / 'talks.jsonl'}"
    train(load_recipe("rows", [data, *SHORT]), tmp_path / "1", model=base, quiet=True)
    assert (tmp_path / "1/rows/trainable_rows.json").exists()
    two = load_recipe("rows-lora", [data, *SHORT])
    train(two, tmp_path / "2", model=tmp_path / "1/model", quiet=True)
    model, _ = xoron_core.load(tmp_path / "1/model")
    xoron_core.load_rows(model, tmp_path / "2/rows")
    load_adapter(model, tmp_path / "2/adapter").remove(merge=True)
    assert changed(model.state_dict(), weights(tmp_path / "2/model")) == set()


def test_rows_that_cannot_be_trained_are_refused_before_the_run(recipe, base, tmp_path):
    for error, message, changes in (
        (ConfigError, "no trained parameter|none of the 2 trained", {"muon": {}}),
        (ConfigError, "image.codec learns from media alone, backbone", {"train": ["image.codec"]}),
        (TokenSpaceError, "smell", {"rows": {"start": "text", "descriptions": {"smell": "x"}}}),
    ):
        with pytest.raises(error, match=message):
            train(recipe(**changes), tmp_path / "run", model=base, quiet=True)
        assert not (tmp_path / "run").exists()
    for rows in ({"start": "text"}, {"descriptions": {CODEBOOK: "x"}}):
        with pytest.raises(ConfigError, match="start: text goes with descriptions"):
            recipe(rows=rows)
