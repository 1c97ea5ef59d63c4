"""Proves vision without a language model, and the published compositions at their full sizes.

`xoron compose --plugins vision` gives a folder that encodes images and says what text needs; Track
A and the Xoron preset are planned on the meta device.
"""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import xoron_core
from xoron_core.cli.app import invoke
from xoron_core.composer.composition import read_composition
from xoron_core.composer.planner import plan
from xoron_core.encode import grouped, load_ahead
from xoron_core.errors import CompositionError, DataError, PluginError, SequenceError
from xoron_core.plugins import registry
from xoron_core.session import Session

pytest.importorskip("xoron_vision", reason="needs xoron-vision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vision") / "m"
    assert invoke(["compose", "--plugins", "vision", "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    paths = []
    for seed, size in enumerate([(64, 64), (40, 90), (120, 30)]):
        rng = np.random.default_rng(seed)
        paths.append(out / f"{seed}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def planned(plugins, preset, *overrides):
    chosen = registry().select(plugins)
    made = plan(read_composition(chosen, preset=preset, overrides=overrides), chosen)
    return {row.slot: row for row in made.rows}, made


def test_the_folder_holds_encoder_and_projector_and_no_text(folder):
    config = json.loads((folder / "config.json").read_text())
    assert set(config["composition"]["slots"]) == {"image.encoder", "image.projector"}
    assert not (folder / "tokenizer.json").exists()
    assert not (folder / "token_space.json").exists()
    model, _ = xoron_core.load(folder)
    same, _ = xoron_core.compose(plugins="vision", preset="tiny")
    assert all(map(torch.equal, model.parameters(), same.parameters()))


def test_encode_is_processor_encoder_projector_in_any_batch_size(folder, images):
    model, processor = xoron_core.load(folder)
    with torch.no_grad():
        seen = model.part("image.encoder")(**processor.media_batch("image.encoder", images))
        want = model.part("image.projector")(seen)
    assert want.values.shape == (3, 16, 96)
    for size in (8, 2, 1):
        got = model.encode(images, batch_size=size)
        torch.testing.assert_close(got.values, want.values, rtol=0, atol=1e-5)
        assert torch.equal(got.mask, want.mask)
    raw = model.encode(images, project=False)
    torch.testing.assert_close(raw.values, seen.values, rtol=0, atol=1e-5)
    assert raw.positions is not None
    one = model.encode(Image.open(images[1]))
    torch.testing.assert_close(one.values[0], want.values[1], rtol=0, atol=1e-5)
    assert (want.values[0] - want.values[1]).abs().max() > 1e-3
    model.train()
    model.encode(images[0])
    assert model.training


def test_encode_pads_images_of_different_lengths_and_masks_it(images):
    tower = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_patches": 16,
             "patch_size": 8}  # fmt: skip
    image = {"encoder": {"use": "siglip", "vision_config": tower}}
    model, _ = xoron_core.compose({"image": image})
    alone = [model.encode(path) for path in images]
    together = model.encode(images, batch_size=1)
    lengths = [f.values.shape[1] for f in alone]
    assert len(set(lengths)) > 1
    assert together.mask.sum(-1).tolist() == lengths
    for row, one in zip(together.values, alone, strict=True):
        assert torch.equal(row[: one.values.shape[1]], one.values[0])


def test_many_images_come_back_in_order_and_a_broken_one_is_named(folder, images, tmp_path):
    model, _ = xoron_core.load(folder)
    each = [model.encode(path).values[0] for path in images]
    many = [images[i % 3] for i in range(20)]
    got = model.encode(many, batch_size=6).values
    for index, row in enumerate(got):
        torch.testing.assert_close(row, each[index % 3], rtol=0, atol=1e-5)
    (tmp_path / "cut.png").write_bytes(images[0].read_bytes()[:100])
    model.train()
    with pytest.raises(DataError, match=r"cut\.png"):
        model.encode([*many, tmp_path / "cut.png"])
    assert model.training
    with pytest.raises(SequenceError, match="batch_size is 0, expected 1 or more"):
        model.encode(images, batch_size=0)


def test_loading_ahead_is_in_order_bounded_and_beside_the_caller():
    pulled, second = [], threading.Event()

    def items():
        for index in range(10):
            pulled.append(index)
            yield index

    def load(index):
        if index == 1:
            second.set()
        return {"index": index}

    stream = load_ahead(load, items(), count=3)
    assert next(stream) == {"index": 0}
    assert second.wait(30)  # loaded although nobody has asked for it
    assert pulled == [0, 1, 2]
    assert next(stream) == {"index": 1}
    assert pulled == [0, 1, 2, 3]
    assert [item["index"] for item in stream] == list(range(2, 10))


@pytest.mark.parametrize(
    ("sizes", "count", "features", "want"),
    [
        ([200] * 8, 8, 1024, [5, 3]),
        ([200] * 8, 3, 1024, [3, 3, 2]),
        ([200] * 8, 8, None, [8]),
        ([2000, 10, 10, 2000, 3000], 8, 1024, [1, 2, 1, 1]),
        ([100, 100, 600, 100], 8, 1024, [2, 1, 1]),  # padded to 600, three would be 1800
        ([512, 512, 1], 8, 1024, [2, 1]),
    ],
)
def test_groups_hold_what_fits_with_its_padding(sizes, count, features, want):
    items = [{"size": size} for size in sizes]
    made = list(grouped(items, lambda item: item["size"], count=count, features=features))
    assert [len(group) for group in made] == want
    assert [item for group in made for item in group] == items


@pytest.fixture
def checkpoint(tmp_path):
    """A tower as it is published: config, weights, preprocessor."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(tmp_path / "tower")
    SiglipImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.mark.parametrize("encoder", ["siglip", "xoron-vision"])
def test_a_checkpoint_is_read_once_and_the_folder_does_without_it(
    checkpoint, images, tmp_path, encoder
):
    tower = {"path": str(checkpoint), "vision_config": None}
    small = {"num_latents": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    slot = {"use": encoder, **(tower if encoder == "siglip" else {"tower": tower, **small})}
    model, processor = xoron_core.compose({"image": {"encoder": slot}}, plugins="vision")
    loaded_tower = {n: p for n, p in model.named_parameters() if "tower.encoder.layers" in n}
    source = load_file(checkpoint / "model.safetensors")
    for name, parameter in loaded_tower.items():
        (theirs,) = [v for k, v in source.items() if k.endswith(name.rpartition("tower.")[2])]
        assert torch.equal(parameter, theirs)
    assert processor.processors["image.encoder"].how.mean == (0.1, 0.2, 0.3)
    xoron_core.save(model, processor, tmp_path / "m")
    for file in checkpoint.iterdir():
        file.unlink()
    again, _ = xoron_core.load(tmp_path / "m")
    want = model.encode(images).values
    assert torch.equal(again.encode(images).values, want)
    half, _ = xoron_core.load(tmp_path / "m", dtype=torch.bfloat16)
    got = half.encode(images).values
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.15)


def test_the_command_writes_what_the_method_gives(folder, images, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    names = [str(path) for path in images]
    assert invoke(["encode", str(folder), *names, "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model, _ = xoron_core.load(folder)
    want = model.encode(names)
    found = load_file(out)
    assert torch.equal(found["values"], want.values)
    assert torch.equal(found["mask"], want.mask)
    assert told["shapes"]["values"] == list(want.values.shape)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["media"]) == names
    assert invoke(["encode", str(folder), names[0], "-o", str(out), "--features"]) == 0
    assert load_file(out)["values"].shape == (1, 64, 96)


def test_mistakes_are_one_message(folder, images, tmp_path, capsys):
    out = str(tmp_path / "f.safetensors")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    from xoron_core.cli import main

    for arguments, code, words in (
        ([str(bad), "-o", out], 1, "bad.png"),
        ([str(images[0]), "-o", str(tmp_path / "no" / "f")], 1, "cannot be written"),
        ([str(images[0]), "-o", out, "--slot", "audio.encoder"], 2, "pip install xoron-audio"),
        ([str(images[0]), "-o", out, "--batch-size", "0"], 2, "expected 1 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["encode", str(folder), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == code, error
        assert words in error
        assert "Traceback" not in error


def test_asking_for_text_names_the_missing_package(folder, images):
    model, processor = xoron_core.load(folder)
    for ask in (
        lambda: model.generate(torch.ones(1, 2, dtype=torch.long)),
        lambda: processor([{"role": "user", "content": "hi"}]),
        lambda: Session(model, processor).stream("hi"),
    ):
        with pytest.raises(PluginError, match="pip install xoron-llm"):
            ask()
    with pytest.raises(SequenceError, match="no media"):
        model.encode([])
    with pytest.raises(CompositionError, match=r"holds no encoder.*image\.encoder"):
        model.encode(images[0], slot="image.projector")


def test_track_a_has_the_published_connector_and_trains_nothing_else_of_vision():
    rows, made = planned("vision", "qwen3-vlm", "image.projector.output_size=4096")
    assert rows["image.projector"].parameters == rows["image.projector"].trainable == 82_445_824
    assert rows["image.encoder"].parameters == 412_987_248
    assert rows["image.encoder"].trainable == 0
    normed, _ = planned(
        "vision",
        "qwen3-vlm",
        "image.projector.output_size=4096",
        "image.projector.vision_norm=true",
    )
    assert normed["image.projector"].parameters - 82_445_824 == 2304
    assert made.space is None


def test_track_a_beside_a_backbone_of_its_width_has_the_published_connector():
    pytest.importorskip("xoron_llm", reason="needs xoron-llm")
    qwen3 = (
        "{use: hf, hf_config: {model_type: qwen3, hidden_size: 4096, intermediate_size: 64,"
        " num_hidden_layers: 1, num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128,"
        " vocab_size: 300}}"
    )
    rows, made = planned("llm,vision", "qwen3-vlm", "tokenizer={use: byte}", f"backbone={qwen3}")
    assert rows["image.projector"].parameters == 82_445_824
    assert "<image_patch>" in made.space.special_ids


def test_track_a_writes_its_own_placeholder_sixty_four_times_between_two_markers(tmp_path):
    pytest.importorskip("xoron_llm", reason="needs xoron-llm")
    model, processor = xoron_core.compose(
        plugins="llm,vision",
        preset="qwen3-vlm",
        overrides=[
            "tokenizer={use: byte}",
            "backbone={use: xoron-moe, preset: tiny, num_layers: 2}",
            "image.encoder={use: siglip, preset: tiny, freeze: true}",
            "tokens={placeholders: {image: <image_patch>}}",  # not Qwen's markers and groups
        ],
    )
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "what is <image_patch>?"},
    ]
    batch = processor([{"role": "user", "content": content}])
    strings = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    start = strings.index("<|image|>")
    assert strings[start : start + 66] == ["<|image|>", *["<image_patch>"] * 64, "<|/image|>"]
    assert strings.count("<image_patch>") == 64  # what is written as text stays text
    xoron_core.save(model, processor, tmp_path / "m")
    loaded, again = xoron_core.load(tmp_path / "m")
    same = again([{"role": "user", "content": content}])
    assert torch.equal(same["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**same).logits)


def test_the_xoron_preset_is_planned_at_its_published_shapes():
    rows, made = planned("vision", "xoron-dev")
    slots = made.composition.slots
    assert slots["image.encoder"].config["num_latents"] == 256
    assert slots["image.encoder"].config["dual_stream_layers"] == 2
    assert slots["image.projector"].config["num_tokens"] == 64
    assert slots["image.projector"].feature_size == 512
    assert rows["image.encoder"].parameters == 448_912_688


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A tiny random Qwen3 with the real vocabulary and a chat template for text alone."""
    pytest.importorskip("xoron_llm", reason="needs xoron-llm")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from xoron_core.components import Context
    from xoron_llm.tokenizers.config import QwenConfig
    from xoron_llm.tokenizers.qwen import QwenTokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    Qwen3ForCausalLM(config).eval().save_pretrained(folder)
    tokenizer = QwenTokenizer(QwenConfig(base_specials="keep"), Context("tokenizer")).base()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_over_a_pretrained_base_images_stand_in_the_bases_own_template(qwen3):
    model, processor = xoron_core.compose(
        plugins="llm,vision",
        preset="qwen3-vlm",
        overrides=[
            f"tokenizer={{use: qwen2.5, source: {qwen3}, base_specials: keep}}",
            f"backbone={{use: hf, path: {qwen3}}}",
            "image.encoder={use: siglip, preset: tiny, freeze: true}",
        ],
    )
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(2))
    content = [
        "see ",
        {"type": "image", "image": first},
        {"type": "text", "text": " and <image_patch>"},
        {"type": "image", "image": second},
    ]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    batch = processor(talk, train=True)
    ids = batch["input_ids"][0]
    strings = processor.tokenizer.convert_ids_to_tokens(ids)
    block = ["<|vision_start|>", *["<image_patch>"] * 64, "<|vision_end|>"]
    places = [i for i, s in enumerate(strings) if s == "<|vision_start|>"]
    assert [strings[i : i + 66] for i in places] == [block, block]
    assert strings.count("<image_patch>") == 128
    assert strings[0] == "<|im_start|>"
    assert "<|user|>" not in strings
    rest = [s for i, s in enumerate(ids.tolist()) if not any(p <= i < p + 66 for p in places)]
    want = (
        "<|im_start|>user\nsee  and <image_patch><|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert processor.tokenizer.decode(rest) == want
    learned = ids[batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learned).strip().startswith("yes")
    with torch.no_grad():
        spans = batch["media"]["image.encoder"]["spans"]
        assert spans[:, 1].tolist() == [place + 1 for place in places]
        logits = model(input_ids=batch["input_ids"], media=batch["media"]).logits
        swapped = dict(batch["media"]["image.encoder"])
        swapped["pixel_values"] = swapped["pixel_values"].flip(0)
        other = model(input_ids=batch["input_ids"], media={"image.encoder": swapped}).logits
    assert torch.equal(logits[0, : places[0]], other[0, : places[0]])
    assert (logits[0, places[0] + 64 :] - other[0, places[0] + 64 :]).abs().max() > 1e-5
