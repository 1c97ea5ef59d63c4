"""Proves that codecs and autoencoders train from a recipe on media alone, with and without a
backbone beside them: exact resume with codebooks and a discriminator, micro-batches, what is read
of a conversation and what is left out, and held-out losses.

The images are blocks of random colours.
"""

from __future__ import annotations

import json
import pickle
import shutil
import wave

import numpy as np
import pytest
import torch

import xoron_core
from tests.training import records, train_in_two_processes, weights
from xoron_core.errors import ConfigError
from xoron_core.storage import read_tensors
from xoron_train import train
from xoron_train.metrics import read_metrics, shown_evaluation

pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from accelerate import Accelerator
from PIL import Image  # comes with xoron-vision

from xoron_train.data.media_feed import MediaFeed
from xoron_train.recipe import Recipe

CODEC = {"use": "vq-image", "preset": "tiny"}
GAN = {"use": "patch-gan", "preset": "tiny", "of": "image.codec"}


def picture(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def write_lines(path, talks):
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def shows(*images, role="user"):
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": "look"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four images, a conversation with each."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(24):
        picture(number).save(folder / f"{number}.png")
    write_lines(folder / "talks.jsonl", [[shows(f"{n}.png")] for n in range(24)])
    return folder


@pytest.fixture(scope="module")
def new_model(tmp_path_factory):
    """Composes a model folder of image parts, without any text."""

    def make(**slots):
        folder = tmp_path_factory.mktemp("model") / "m"
        xoron_core.save(*xoron_core.compose({"name": "x", "image": slots}), folder)
        return folder

    return make


@pytest.fixture
def recipe(folder):
    def make(**changes):
        return Recipe.parse(
            {
                "name": "alone",
                "mixture": {
                    "talks": {"kind": "conversations", "path": str(folder / "talks.jsonl")}
                },
                "eval_fraction": 0.2,
                "batch_size": 4,
                "max_steps": 4,
                "learning_rate": 0.001,
                "log_every": 1,
                "tensorboard": False,
                **changes,
            }
        )

    return make


def test_resumed_is_uninterrupted_bit_for_bit_with_codebook_and_discriminator(
    recipe, new_model, tmp_path
):
    model = new_model(codec=CODEC, judge=GAN)
    chosen = recipe(save_every=2, eval_every=2, gradient_accumulation_steps=2, keep_checkpoints=9)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(chosen, straight, model=model, quiet=True)
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints/step-00000004")
    shutil.rmtree(broken / "model")
    judge = {
        step: (straight / f"checkpoints/step-{step:08d}/trainer/losses.safetensors").read_bytes()
        for step in (2, 4)
    }
    assert judge[2] != judge[4]  # it learns, so a resume that began it anew would differ
    train(chosen, broken, resume=True, quiet=True)
    assert records(broken) == records(straight)
    kept = broken / "checkpoints/step-00000004/trainer/losses.safetensors"
    assert kept.read_bytes() == judge[4]
    before, after, again = (weights(f) for f in (model, straight / "model", broken / "model"))
    for name, tensor in after.items():
        assert torch.equal(tensor, again[name]), name
        learned = "judge" not in name and not torch.equal(tensor, before[name])
        assert learned or "judge" in name, f"{name} was not trained"
    assert not any("judge" in file.name for file in (straight / "model/slots").iterdir())


def test_records_count_items_and_not_tokens(recipe, new_model, tmp_path):
    result = train(recipe(eval_every=2), tmp_path / "run", model=new_model(codec=CODEC), quiet=True)
    found = records(tmp_path / "run")
    trained = [record for record in found if record["kind"] == "train"]
    assert [record["items"] for record in trained] == [4, 8, 12, 16]
    assert set(trained[0]["losses"]) == {"image.codec/pixel", "image.codec/commitment"}
    assert trained[0]["loss"] == pytest.approx(sum(trained[0]["losses"].values()))
    assert 0 < trained[0]["parts"]["image.codec/code_entropy"] < 1
    for record in found:
        assert not {"tokens", "bits_per_byte", "tokens_per_second"} & record.keys()
    raw = read_metrics(tmp_path / "run/metrics.jsonl")[0]
    assert raw["items_per_second"]["image"] > 0
    held_out = result.evaluation
    assert held_out["items"] > 0
    assert shown_evaluation(held_out)[0] == f"held-out loss: {held_out['loss']:.4f}"


STILL = {**CODEC, "decay": 0.9999999, "restart_below": 0.0}  # its codebook hardly moves


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("slot", "part", "losses"),
    [
        ("codec", STILL, ["pixel", "commitment"]),
        # In training mode it would sample its latents.
        ("autoencoder", {"use": "kl-image", "preset": "tiny"}, ["pixel", "kl"]),
    ],
)
def test_the_held_out_loss_is_that_of_one_batch_in_evaluation_mode(
    recipe, new_model, tmp_path, slot, part, losses, batch_size
):
    # A step too small to change a weight.
    name, model = f"image.{slot}", new_model(**{slot: part})
    chosen = recipe(
        max_steps=1,
        learning_rate=1e-30,
        batch_size=batch_size,
        loss_weights={f"{name}/pixel": 3},
    )
    found = train(chosen, tmp_path / "run", model=model, quiet=True).evaluation
    trained, processor = xoron_core.load(tmp_path / "run/model")
    common = {"processor": processor, "accelerator": Accelerator(), "slots": [name]}
    rows = list(MediaFeed(chosen, trained, **common).talks.held_out("talks"))
    assert found["items"] == len(rows) > 3
    media = processor.collate_media(name, [row.media[name][0] for row in rows])
    with torch.no_grad():
        terms = trained.eval()(media={name: media}).losses
    assert set(terms) == {f"{name}/{loss}" for loss in losses}
    means = {loss: float(term.sum / term.count) for loss, term in terms.items()}
    assert found["losses"] == pytest.approx(means, rel=1e-4)
    weighed = sum((3 if "pixel" in loss else 1) * mean for loss, mean in means.items())
    assert found["loss"] == pytest.approx(weighed, rel=1e-4)


def test_micro_batches_move_weights_and_codebook_as_one_batch(recipe, new_model, tmp_path):
    # Without restarts: which input an unused code begins at is drawn anew in each pass.
    model = new_model(codec={**CODEC, "restart_below": 0.0})
    found = {}
    for size in (8, 4):
        # Plain steps: Adam would divide rounding by rounding where a gradient is nearly zero.
        chosen = recipe(
            batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            eval_fraction=0.0,
            epsilon=1.0,
            learning_rate=1.0,
        )
        train(chosen, tmp_path / str(size), model=model, quiet=True)
        found[size] = weights(tmp_path / str(size) / "model")
    start = weights(model)
    moved = 0
    for name, tensor in found[8].items():
        torch.testing.assert_close(found[4][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        moved += float((tensor - start[name]).abs().max()) > 1e-3
    codebook = "slots.image__codec.quantizer.codebook"
    assert float((found[8][codebook] - start[codebook]).abs().max()) > 1e-2
    assert moved > len(start) / 2


def test_a_model_with_a_backbone_trains_its_codec_alone(recipe, folder, tmp_path):
    pytest.importorskip("xoron_llm", reason="needs xoron-llm")
    data = {
        "name": "x",
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
        "image": {"codec": CODEC, "judge": GAN},
    }
    base = tmp_path / "base"
    xoron_core.save(*xoron_core.compose(data), base)
    alone = recipe(train=["image.codec", "image.judge"], save_delta=True)
    train(alone, tmp_path / "codec", model=base, quiet=True)
    before, after = weights(base), weights(tmp_path / "codec/model")
    patched, _ = xoron_core.load(base, deltas=[tmp_path / "codec/connector"])
    assert all(torch.equal(tensor, after[name]) for name, tensor in patched.state_dict().items())
    changed = {n.split(".")[1] for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed - {"image__judge"} == {"image__codec"}
    assert all(record["items"] for record in records(tmp_path / "codec")[:4])
    # A recipe of text leaves the codec as it is, and its optimizer without it, so it can resume.
    words = {"words": {"kind": "files", "path": str(folder), "pattern": "*.jsonl"}}
    text = recipe(mixture=words, eval_fraction=0.0, sequence_length=32, max_steps=2, save_every=1)
    train(text, tmp_path / "text", model=base, quiet=True)
    after = weights(tmp_path / "text/model")
    changed = {n.split(".")[1] for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {"backbone"}
    first = tmp_path / "text/checkpoints/step-00000001/trainer"
    state = read_tensors(first / "optimizer.safetensors")
    assert {name.split(".")[1] for name in state} == {"backbone"}
    for gone in ("checkpoints/step-00000002", "model"):
        shutil.rmtree(tmp_path / "text" / gone)
    train(text, tmp_path / "text", resume=True, quiet=True)
    both = recipe(train=["image.codec", "backbone"])
    with pytest.raises(ConfigError, match=r"image.codec learns from media alone, backbone from"):
        train(both, tmp_path / "both", model=base, quiet=True)


def test_every_image_of_a_conversation_is_read_whoever_shows_it(
    recipe, new_model, folder, tmp_path, caplog
):
    talks = [
        [shows("0.png", "1.png"), shows("2.png", role="assistant")],
        [{"role": "user", "content": "no image"}, {"role": "assistant", "content": "none"}],
        [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}, shows("3.png")],
    ]
    for number in range(4):
        shutil.copy(folder / f"{number}.png", tmp_path)
    path = write_lines(tmp_path / "talks.jsonl", talks)
    mixture = {"talks": {"kind": "conversations", "path": str(path)}}
    chosen = recipe(mixture=mixture, eval_fraction=0.0, batch_size=1, max_steps=4)
    with caplog.at_level("INFO", logger="xoron.train"):
        train(chosen, tmp_path / "run", model=new_model(codec=CODEC), quiet=True)
    assert [record["items"] for record in records(tmp_path / "run")][1::2] == [4, 8]
    assert "left out: {'without a medium': 1}" in caplog.text


def test_held_out_and_golden_images_are_told_by_what_they_show(recipe, new_model, folder, tmp_path):
    model, processor = xoron_core.load(new_model(codec=CODEC))
    picture(5).save(tmp_path / "copy.png", compress_level=0)
    golden = write_lines(tmp_path / "golden.jsonl", [[shows("copy.png")]])

    def sides(**changes):
        common = {"processor": processor, "accelerator": Accelerator(), "slots": ["image.codec"]}
        feed = MediaFeed(recipe(**changes), model, **common)
        source = feed.talks.training["talks"]
        return [talk.on for talk in source.walk(range(len(source)))]

    free, kept = sides(), sides(golden=[str(golden)])
    assert {"train", "held-out"} == set(free)
    assert free[5] == "train"
    assert [n for n in range(24) if free[n] != kept[n]] == [5]
    assert kept[5] == "golden"


def test_a_source_travels_to_workers_and_reads_the_same(recipe, new_model):
    model, processor = xoron_core.load(new_model(codec=CODEC))
    common = {"processor": processor, "accelerator": Accelerator(), "slots": ["image.codec"]}
    source = MediaFeed(recipe(), model, **common).talks.training["talks"]
    twin = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    index = next(n for n, talk in enumerate(source.walk(range(24))) if talk.on == "train")
    (one,), (two,) = (each.read(index).media["image.codec"] for each in (source, twin))
    assert one.keys() == two.keys() == {"pixel_values", "original_size"}
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_recordings_of_any_length_train_a_residual_codec_and_resume(recipe, tmp_path):
    pytest.importorskip("xoron_audio", reason="needs xoron-audio")
    talks = []
    for number in range(10):
        length = np.arange(3000 + 500 * (number % 4))
        sound = np.sin(length * (number + 2) / 40) * 20_000
        with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(sound.astype("<i2").tobytes())
        talks.append([{"role": "user", "content": [{"type": "audio", "audio": f"{number}.wav"}]}])
    path = write_lines(tmp_path / "talks.jsonl", talks)
    base = tmp_path / "base"
    codec = {"use": "rvq-audio", "preset": "tiny", "dropout": 0.5}
    xoron_core.save(*xoron_core.compose({"name": "x", "audio": {"codec": codec}}), base)
    mixture = {"talks": {"kind": "conversations", "path": str(path)}}
    chosen = recipe(mixture=mixture, batch_size=3, max_steps=4, save_every=2, keep_checkpoints=9)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(chosen, straight, model=base, quiet=True)
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints/step-00000004")
    shutil.rmtree(broken / "model")
    train(chosen, broken, resume=True, quiet=True)
    assert records(broken) == records(straight)
    assert read_metrics(straight / "metrics.jsonl")[0]["items_per_second"]["audio"] > 0
    before, after, again = (weights(f) for f in (base, straight / "model", broken / "model"))
    books = [name for name in after if name.endswith("codebook")]
    assert books
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())
    assert not any(torch.equal(after[name], before[name]) for name in books)


def test_kl_image_trains_and_an_encoder_beside_it_stays(recipe, new_model, tmp_path):
    model = new_model(
        autoencoder={"use": "kl-image", "preset": "tiny"},
        encoder={"use": "conv-vit", "preset": "tiny"},
    )
    train(recipe(max_steps=2), tmp_path / "run", model=model, quiet=True)
    before, after = weights(model), weights(tmp_path / "run/model")
    changed = {n.split(".")[1] for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {"image__autoencoder"}
    names = set(records(tmp_path / "run")[0]["losses"])
    assert names == {"image.autoencoder/pixel", "image.autoencoder/kl"}


def test_what_cannot_train_alone_is_refused_before_the_run(recipe, new_model, folder, tmp_path):
    judged = new_model(codec=CODEC, judge=GAN)
    words = {"kind": "files", "path": str(folder), "pattern": "*.jsonl"}
    talks = {"kind": "conversations", "path": str(folder / "talks.jsonl")}
    for message, changes in {
        r"loss in slot 'image.judge' has parameters": {"train": ["image.codec"]},
        r"mixture.words: holds text, and image.codec": {"mixture": {"t": talks, "words": words}},
        r"legal: is about sequences": {"legal": True},
    }.items():
        with pytest.raises(ConfigError, match=message):
            train(recipe(**changes), tmp_path / "run", model=judged, quiet=True)
        assert not (tmp_path / "run").exists()
    fixed = new_model(codec={"use": "hf-vq", "preset": "tiny"})
    with pytest.raises(ConfigError, match=r"slot 'image.codec' holds hf-vq, which has no training"):
        train(recipe(train=["image.codec"]), tmp_path / "run", model=fixed, quiet=True)
    spared = recipe(train=["image.codec"], loss_weights={"image.judge": 0.0}, max_steps=1)
    train(spared, tmp_path / "spared", model=judged, quiet=True)


@pytest.mark.slow
def test_two_processes_equal_one(recipe, new_model, tmp_path):
    model = new_model(codec={**CODEC, "restart_below": 0.0}, judge=GAN)
    keys = {"batch_size": 2, "max_steps": 3, "save_every": 2}
    two, one = tmp_path / "two", tmp_path / "one"
    train_in_two_processes(recipe(**keys), two, model=model)
    train(recipe(**keys, gradient_accumulation_steps=2), one, model=model, quiet=True)
    pairs = list(zip(records(two), records(one), strict=True))
    assert len(pairs) == 4
    for record, expected in pairs:
        assert record["items"] == expected["items"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    codebook = "slots.image__codec.quantizer.codebook"
    made = [weights(run / "model")[codebook] for run in (two, one)]
    torch.testing.assert_close(*made, rtol=1e-3, atol=1e-4)
