"""Proves Track A, the preset `qwen3-vlm`: on folders as the published checkpoints are, an image is
64 positions between Qwen's own markers, injected as a hand-written loop over transformers' own
classes injects it, and no row is read that the checkpoints do not have.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import xoron_core
from tests.lively import enliven
from xoron_core.cli import run
from xoron_core.components import Context, Features
from xoron_core.errors import CompositionError, SequenceError
from xoron_core.media import embed
from xoron_core.model import XoronModel
from xoron_core.sampling import text_rows
from xoron_core.session import Session

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")

SLOT = "image.encoder"
K = 64
BEGIN, PATCH, END = "<|vision_start|>", "<image_patch>", "<|vision_end|>"
TEXT_ROWS = 151_669
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A small Qwen3 with the real vocabulary, its 26 added tokens, padding rows and a template."""
    from xoron_llm.tokenizers.config import QwenConfig
    from xoron_llm.tokenizers.qwen import QWEN3_ADDED, QwenTokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    enliven(model)
    model.save_pretrained(folder)
    tokenizer = QwenTokenizer(QwenConfig(), Context(slot="tokenizer")).base()
    tokenizer.add_tokens([string for string, _ in QWEN3_ADDED[22:]])
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A small SigLIP of both towers with its preprocessor, as the published ones are."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    model = SiglipModel(
        SiglipConfig(
            text_config={**sizes, "vocab_size": 64},
            vision_config={**sizes, "image_size": 56, "patch_size": 14},
        )
    )
    enliven(model)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=2).save_pretrained(folder)
    return folder


def compose(language, towers, *more):
    overrides = [f"backbone.path={language}", f"image.encoder.path={towers}", *more]
    return xoron_core.compose(plugins="llm,vision", preset="qwen3-vlm", overrides=overrides)


@pytest.fixture(scope="module")
def composed(language, towers):
    return compose(language, towers)


def picture(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(12, axis=0).repeat(12, axis=1))


def ask(*parts):
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
        for p in parts
    ]
    return [{"role": "user", "content": content}]


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def test_qwens_tokens_template_and_rows_stay_and_its_own_markers_are_used(composed, language):
    model, processor = composed
    base = AutoTokenizer.from_pretrained(language)
    space = model.space
    assert space.text_size == TEXT_ROWS
    assert {s: processor.tokenizer.convert_tokens_to_ids(s) for s in base.get_added_vocab()} == (
        base.get_added_vocab()
    )
    ids = base.convert_tokens_to_ids([BEGIN, END])
    assert [space.id_of(BEGIN), space.id_of(END)] == ids == [151_652, 151_653]
    assert space.id_of(PATCH) >= TEXT_ROWS
    assert space.size == TEXT_ROWS + 14, "of ours, only what belongs to images"
    talk = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert processor.tokenizer.chat_template == base.chat_template
    want = base.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True)["input_ids"]
    assert processor.plan(ask("Hi")).input_ids.tolist() == want
    assert len(processor.plan(talk).input_ids) > len(want) + 1, "markup of a user stays text"


def test_an_image_costs_64_positions_and_its_two_markers_and_images_keep_their_order(composed):
    _, processor = composed
    plain = processor(ask("What is this?"))["input_ids"]
    batch = processor(ask("What is this?", picture(0), picture(1)))
    assert batch["input_ids"].shape[1] - plain.shape[1] == 2 * (K + 2)
    strings = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    found = [(s, strings.count(s)) for s in (BEGIN, PATCH, END)]
    assert found == [(BEGIN, 2), (PATCH, 2 * K), (END, 2)]
    for item, (row, start, length) in enumerate(batch["media"][SLOT]["spans"].tolist()):
        assert (row, length) == (0, K)
        assert strings[start - 1 : start + K + 1] == [BEGIN, *[PATCH] * K, END]
        own = processor.load_media(SLOT, picture(item))["pixel_values"]
        assert np.array_equal(batch["media"][SLOT]["pixel_values"][item], own)


def test_text_alone_gives_the_logits_of_the_bare_qwen3(composed, language):
    model, processor = composed
    bare = Qwen3ForCausalLM.from_pretrained(language).eval()
    for talk in (ask("What moves? naïve 数字 123"), ask("no")):
        ours, theirs = (logits(m, **processor(talk))[..., :TEXT_ROWS] for m in (model, bare))
        assert torch.equal(ours, theirs)


class ByHand:
    """The published injection over transformers' own classes, one image and one id at a time."""

    def __init__(self, model, language, towers):
        self.language = Qwen3ForCausalLM.from_pretrained(language).eval()
        self.tower = SiglipModel.from_pretrained(towers).eval().vision_model
        self.preprocess = SiglipImageProcessorPil.from_pretrained(towers)
        self.project = model.part("image.projector")
        self.space, self.folder = model.space, language

    @torch.no_grad()
    def tokens(self, image):
        pixels = self.preprocess(image, return_tensors="pt")["pixel_values"]
        features = self.tower(pixel_values=pixels).last_hidden_state
        assert features.shape == (1, 16, 32)
        return self.project(Features(features, torch.ones(1, 16, dtype=torch.bool))).values[0]

    @torch.no_grad()
    def embeds(self, ids, images):
        rows = iter([row for image in images for row in self.tokens(image)])
        table = self.language.get_input_embeddings().weight
        patch = self.space.id_of(PATCH)
        found = torch.stack([next(rows) if i == patch else table[i] for i in ids.tolist()])
        assert next(rows, None) is None
        return found[None]

    def greedy(self, ids, images, count):
        banned = (~text_rows(self.space)).nonzero().flatten().tolist()
        banned += [self.space.size + i for i in range(151_936 - self.space.size)]
        banned += [AutoTokenizer.from_pretrained(self.folder).eos_token_id]
        embeds = self.embeds(ids, images)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        out = self.language.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count, do_sample=False,
            suppress_tokens=banned, pad_token_id=0,
        )  # fmt: skip
        return out[0].tolist()


@pytest.fixture(scope="module")
def by_hand(composed, language, towers):
    return ByHand(composed[0], language, towers)


TALKS = [
    (ask("What is ", picture(0), " and ", picture(1), "?"), [0, 1]),
    (ask("no image here"), []),
    (ask(picture(2), "a longer question about one image, padded on the left?"), [2]),
]


def test_embeddings_are_those_of_a_loop_over_transformers_own_classes(composed, by_hand):
    model, processor = composed
    for talk, seeds in TALKS:
        batch = processor(talk)
        got = embed(model, batch.get("media", {}), input_ids=batch["input_ids"]).embeds
        want = by_hand.embeds(batch["input_ids"][0], [picture(seed) for seed in seeds])
        # The loop encodes images one by one, which kernels may round differently.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        text = batch["input_ids"] != model.space.id_of(PATCH)
        assert torch.equal(got[text], want[text])


def test_greedy_answers_are_those_of_the_loop_and_no_new_row_is_read(composed, by_hand):
    """The loop's language model is the checkpoint itself, which has none of the new rows."""
    model, processor = composed
    answers = []
    for talk, seeds in TALKS:
        batch = processor(talk)
        ids = model.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        answers.append(ids[0, batch["input_ids"].shape[1] :].tolist())
        images = [picture(seed) for seed in seeds]
        assert answers[-1] == by_hand.greedy(batch["input_ids"][0], images, 12)
    assert len(set(map(tuple, answers))) == 3
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        kept = table[TEXT_ROWS:].clone()
        table[TEXT_ROWS:] = 1e4
        changed = logits(model, **processor(TALKS[0][0]))
        table[TEXT_ROWS:] = kept
    assert torch.equal(changed, logits(model, **processor(TALKS[0][0])))


def test_swapping_two_images_swaps_their_blocks_and_changes_what_is_said(composed):
    model, processor = composed
    one, two = (processor(ask(picture(a), " or ", picture(b))) for a, b in ((0, 1), (1, 0)))
    assert torch.equal(one["input_ids"], two["input_ids"])
    first, second = (
        embed(model, batch["media"], input_ids=batch["input_ids"]).embeds[0] for batch in (one, two)
    )
    (_, s, _), (_, t, _) = one["media"][SLOT]["spans"].tolist()
    torch.testing.assert_close(first[s : s + K], second[t : t + K], rtol=0, atol=1e-5)
    torch.testing.assert_close(first[t : t + K], second[s : s + K], rtol=0, atol=1e-5)
    assert (first[s : s + K] - second[s : s + K]).abs().max() > 1e-2
    outside = (one["input_ids"] != model.space.id_of(PATCH))[0]
    assert torch.equal(first[outside], second[outside])
    apart = (logits(model, **one) - logits(model, **two)).abs().amax(-1)[0]
    assert not apart[:s].any()
    assert apart[-1] > 1e-3


def test_a_batch_of_different_prompts_is_each_alone(composed):
    model, processor = composed
    talks = [talk for talk, _ in TALKS]
    together = processor(talks)
    assert not together["attention_mask"].all()
    out = model.generate(**together, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    for row, talk in zip(out, talks, strict=True):
        batch = processor(talk)
        alone = model.generate(**batch, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        assert row[-10:].tolist() == alone[0, -10:].tolist()
    session = Session(model, processor)
    replies = session.generate(talks, max_new_tokens=10)
    assert [r.text for r in replies] == [
        session.generate([talk], max_new_tokens=10)[0].text for talk in talks
    ]


@pytest.mark.parametrize("change", [1, -1])
def test_one_placeholder_too_many_or_few_names_both_counts(composed, change):
    model, processor = composed
    batch = processor(ask("see ", picture(0), "?"))
    _, start, _ = batch["media"][SLOT]["spans"][0].tolist()
    ids = batch["input_ids"]
    block = ids[:, start : start + 1].expand(-1, K + change)
    changed = torch.cat([ids[:, :start], block, ids[:, start + K :]], dim=1)
    with pytest.raises(SequenceError, match=f"takes {K} positions but .* has {K + change}"):
        model(input_ids=changed, images=[picture(0)])


def test_an_answer_never_holds_a_row_that_stands_for_media(composed):
    model, _ = composed
    allowed = text_rows(model.space)
    assert not allowed[[model.space.id_of(s) for s in (BEGIN, PATCH, END, "<|image_pad|>")]].any()
    assert allowed[: TEXT_ROWS - 26].all()
    assert allowed[model.space.text.owned["</think>"]]


def test_the_saved_folder_answers_at_the_command_line_without_the_checkpoints(
    composed, tmp_path, capsys
):
    model, processor = composed
    xoron_core.save(model, processor, tmp_path / "m")
    picture(0).save(tmp_path / "a.png")
    capsys.readouterr()
    assert run(["generate", str(tmp_path / "m"), "What is it?", "--image", str(tmp_path / "a.png"),
                "--max-new-tokens", "8", "--json"]) == 0  # fmt: skip
    answer = json.loads(capsys.readouterr().out)
    want = Session(model, processor).generate(ask(picture(0), "What is it?"), max_new_tokens=8)
    assert answer["text"] == want[0].text


def test_composing_offline_is_one_error_before_anything_is_built(
    offline, monkeypatch, tmp_path, capsys, language
):
    for given, words in (
        ((), "hf backbone: 'Qwen/Qwen3-8B' is no folder here"),
        ((f"backbone.path={language}",), "siglip: 'google/siglip2-so400m-patch14-384' is no"),
    ):
        with monkeypatch.context() as patch:
            build = XoronModel.__init__

            def on_meta(self, *args, build=build, **kwargs):
                assert torch.get_default_device().type == "meta", "weights were allocated"
                build(self, *args, **kwargs)

            patch.setattr(XoronModel, "__init__", on_meta)
            options = [word for item in given for word in ("--set", item)]
            capsys.readouterr()
            assert run(["compose", "--plugins", "llm,vision", "--preset", "qwen3-vlm", "-o",
                        str(tmp_path / "m"), *options]) == 1  # fmt: skip
        err = capsys.readouterr().err
        assert words in err
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "m").exists()


def test_chosen_markers_stand_in_our_own_template_too_and_must_exist():
    tiny = {"tokenizer": {"use": "byte"}, "backbone": {"use": "xoron-moe", "preset": "tiny"}}
    image = {"encoder": {"use": "siglip", "preset": "tiny"},
             "projector": {"use": "perceiver-mlp", "preset": "tiny"}}  # fmt: skip
    tokens = {"placeholders": {"image": PATCH}, "markers": {"image": [BEGIN, END]}}
    _, processor = xoron_core.compose({**tiny, "image": image, "tokens": tokens})
    batch = processor(ask("a", picture(0)))
    strings = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    _, start, length = batch["media"][SLOT]["spans"][0].tolist()
    assert strings[start - 1 : start + length + 1] == [BEGIN, *[PATCH] * length, END]
    said = ask(picture(0))[0]["content"]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "assistant", "content": said}], tokenize=False
    )
    assert f"<|gen_image|>{PATCH}<|/gen_image|>" in text
    with pytest.raises(CompositionError, match=r"needs the markers <\|here\|>"):
        xoron_core.compose(
            {**tiny, "image": image, "tokens": {"markers": {"image": ["<|here|>", END]}}}
        )
