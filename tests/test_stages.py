"""Proves the stages of Track A: at the published size `align` trains exactly the connector and
`sft` adds exactly LoRA r 16; on a tiny model with real images the first leaves a connector that
makes the trained model of its base, and the second an adapter, over a base that stays as it was.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import xoron_core
from xoron_core.composer.composition import read_composition
from xoron_core.composer.space import allocate_space
from xoron_core.configuration import XoronConfig
from xoron_core.errors import ConfigError, FolderError, TokenSpaceError
from xoron_core.model import XoronModel
from xoron_core.plugins import registry

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from xoron_train import load_recipe, train
from xoron_train.deltas import Trained
from xoron_train.lora import load_adapter

SHORT = ["max_steps=3", "batch_size=2", "gradient_accumulation_steps=1", "sequence_length=256",
         "warmup_ratio=0.0", "eval_fraction=0.2", "tensorboard=false", "save_every=2",
         "weight_decay=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Twelve pictures with a question each, as the file that the recipes ask for."""
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "which?"}]
        answer = {"role": "assistant", "content": f"picture {number}"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "talks.jsonl"


def composed(*overrides, projector=True, seed=0):
    """The tiny model that sees, or the same without its connector."""
    data = {
        "name": "tiny",
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", "preset": "tiny"},
        "image": {"encoder": {"use": "siglip", "preset": "tiny"}},
        "tokens": {"groups": ["control", "conversation", "multimodal"]},
    }
    if projector:
        data["image"]["projector"] = {"use": "perceiver", "preset": "tiny"}
    return xoron_core.compose(data, overrides=["backbone.num_layers=2", *overrides], seed=seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "m"
    xoron_core.save(*composed(), folder)
    return folder


@pytest.fixture(scope="module")
def aligned(base, talks, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "align"
    train(stage("align", talks), run, model=base, quiet=True)
    return run


def stage(name, talks, *overrides):
    return load_recipe(name, [f"mixture.images.path={talks}", *SHORT, *overrides])


def states(folder, **options):
    return xoron_core.load(folder, **options)[0].state_dict()


def moved(one, two):
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def published(*overrides):
    """The preset at its published size, on the meta device."""
    chosen = registry().select("llm,vision")
    composition = read_composition(chosen, preset="qwen3-vlm", overrides=overrides)
    with torch.device("meta"):
        space = allocate_space(composition, chosen)
        return XoronModel(XoronConfig(composition=composition.data()), space, registry=chosen)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters.values())


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("norm", "expected"), [("false", 82_445_824), ("true", 82_448_128)])
def test_align_trains_exactly_the_published_connector(offline, talks, norm, expected):
    model = published(f"image.projector.vision_norm={norm}")
    chosen = Trained(model, stage("align", talks))
    assert count(chosen.parameters) == expected
    assert chosen.slots == ["image.projector"]
    assert {name.split(".")[1] for name in chosen.parameters} == {"image__projector"}


def test_sft_adds_exactly_lora_to_every_linear_layer(offline, talks):
    model = published("image.projector.vision_norm=false")
    with torch.device("meta"):
        chosen = Trained(model, stage("sft", talks))
    D, F, L = 4096, 12_288, 36
    sides = 2 * (D + D) + 2 * (D + 1024) + 3 * (D + F)  # q and o, k and v, feed-forward
    assert count(chosen.parameters) == 82_445_824 + 16 * L * sides == 82_445_824 + 43_646_976
    assert len(chosen.adapter.layers) == 7 * L


def test_align_leaves_a_connector_that_makes_the_model_of_its_base(base, aligned, tmp_path):
    before, after = states(base), states(aligned / "model")
    changed = moved(before, after)
    assert changed
    assert {name.split(".")[1] for name in changed} == {"image__projector"}
    assert moved(states(base, deltas=[aligned / "connector"]), after) == set()
    sizes = [sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
             for folder in (aligned / "connector", base)]  # fmt: skip
    assert sizes[0] < 0.2 * sizes[1]
    xoron_core.save(*composed(seed=1), tmp_path / "other")
    with pytest.raises(FolderError, match=r"another base: slot 'backbone' .* slot 'image.encoder'"):
        xoron_core.load(tmp_path / "other", deltas=[aligned / "connector"])


def test_a_connector_is_composed_into_a_base_that_has_none(base, aligned, tmp_path):
    """The text model and the tower of `base`, with the connector out of its delta."""
    model, processor = composed(projector=False)
    whole, _ = xoron_core.load(base)
    theirs = whole.state_dict()
    assert model.space.hash == whole.space.hash
    model.load_state_dict({name: theirs[name] for name in model.state_dict()})
    xoron_core.save(model, processor, tmp_path / "bare")
    grown, processor = xoron_core.load(tmp_path / "bare", deltas=[aligned / "connector"])
    trained, original = xoron_core.load(aligned / "model")
    assert moved(grown.state_dict(), trained.state_dict()) == set()
    image = np.random.default_rng(5).integers(0, 256, (40, 40, 3), np.uint8)
    talk = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    with torch.no_grad():
        assert torch.equal(grown(**processor(talk)).logits, trained(**original(talk)).logits)


def test_another_token_space_is_refused(aligned, tmp_path):
    groups = "tokens.groups=[control, conversation, multimodal, reasoning]"
    xoron_core.save(*composed(groups), tmp_path / "other")
    with pytest.raises(TokenSpaceError, match=r"made with token space sha256:.* model has sha256"):
        xoron_core.load(tmp_path / "other", deltas=[aligned / "connector"])


def test_sft_starts_from_what_has_been_trained_and_leaves_the_base_alone(
    base, talks, aligned, tmp_path
):
    with pytest.raises(ConfigError, match="the weights of slot 'backbone' are random"):
        train(stage("sft", talks), tmp_path / "noise", model=aligned / "model", quiet=True)
    changes = ["max_steps=1", "sequence_length=64", "eval_fraction=0", "warmup_ratio=0"]
    text = load_recipe("text-tiny", [*changes, "train=[backbone]", "tensorboard=false"])
    train(text, tmp_path / "text", model=aligned / "model", quiet=True)
    start = tmp_path / "text/model"
    recipe = stage("sft", talks, "precision=fp32")
    run = tmp_path / "sft"
    train(recipe, run, model=start, quiet=True)
    merged = states(run / "model")
    model, _ = xoron_core.load(start)
    adapter = load_adapter(model, run / "adapter")
    image = np.random.default_rng(5).integers(0, 256, (40, 40, 3), np.uint8)
    talk = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    whole, processor = xoron_core.load(run / "model")
    with torch.no_grad():
        attached = model(**processor(talk)).logits
        torch.testing.assert_close(attached, whole(**processor(talk)).logits, rtol=0, atol=1e-5)
        with adapter.detached():
            assert (attached - model(**processor(talk)).logits).abs().max() > 1e-4
    changed = moved(states(start), merged)
    slots = {name.split(".")[1] for name in changed}
    assert slots == {"backbone", "image__projector"}
    backbone = {name for name in changed if "backbone" in name}
    assert all(name.endswith("_proj.weight") for name in backbone), "more than linear layers moved"
