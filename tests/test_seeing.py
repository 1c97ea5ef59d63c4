"""Proves the evaluations `seeing` and `answers` on models that see images, trained and not.

Losses under interventions equal losses of batches whose images, or features, were exchanged by
hand; images of their own aspect ratios change places only where the sequence allows it; a model
that has learned to see passes, the same model before does not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xoron_core
from tests.distributions import toy_installed
from xoron_core.components import Features
from xoron_core.fill import inject
from xoron_core.losses import text_loss
from xoron_train.evaluations import Conversation, Gate, evaluate_answers, evaluate_seeing
from xoron_train.evaluations.interventions import Interventions

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")

SLOT = "image.encoder"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240,) * 3}
NATIVE = (
    "image.encoder={use: siglip, vision_config: {model_type: siglip2_vision_model, num_patches: 16,"
    " hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,"
    " patch_size: 8}}"
)


def compose(*overrides, plugins="llm,vision"):
    return xoron_core.compose(
        plugins=plugins, preset="tiny", overrides=["backbone.num_layers=2", *overrides]
    )


def picture(seed, height=40, width=40):
    """A square of one of four colours on noise, and the name of the colour."""
    rng = np.random.default_rng(seed)
    name = list(COLOURS)[seed % 4]
    image = np.clip(rng.normal(128, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    row, column = rng.integers(0, min(height, width) - 23, 2)
    image[row : row + 24, column : column + 24] = COLOURS[name]
    return image, name


def about(*images, answer, name="talk"):
    content = [{"type": "text", "text": "colour? "}]
    content += [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Conversation(name, messages, "colour")


def questions(numbers, **size):
    return [
        about(image, answer=name, name=str(seed))
        for seed, (image, name) in ((seed, picture(seed, **size)) for seed in numbers)
    ]


@torch.no_grad()
def one_by_one(model, processor, samples):
    return [float(model(**processor(s.messages, train=True)).loss) for s in samples]


def takes(model, processor, samples, *, seed=0):
    """Whose media each sample is given."""

    def plan(index):
        return processor.plan(samples[index].messages, train=True)

    shown = Interventions(model, processor, plan, slots=[SLOT], seed=seed)
    shown.read(range(len(samples)))
    shown.shuffle([sample.messages[-1]["content"] for sample in samples])
    return shown.takes


def image_of(sample):
    return sample.messages[0]["content"][1]["image"]


def test_shuffled_is_the_loss_of_conversations_about_each_others_images():
    model, processor = compose()
    samples = questions(range(6))
    record = evaluate_seeing(model, processor, samples, batch_size=4)
    wrong = [
        about(image_of(samples[place.sample]), answer=sample.messages[-1]["content"])
        for sample, (place,) in zip(samples, takes(model, processor, samples), strict=True)
    ]
    model.eval()
    assert record["loss"] == pytest.approx(np.mean(one_by_one(model, processor, samples)), abs=1e-5)
    assert record["shuffled"]["loss"] == pytest.approx(
        np.mean(one_by_one(model, processor, wrong)), abs=1e-5
    )
    assert abs(record["shuffled"]["delta"]) > 1e-4


def test_zeroed_is_the_loss_with_what_the_projector_makes_of_zeros():
    model, processor = compose()
    samples = questions(range(4))
    record = evaluate_seeing(model, processor, samples)
    batch = processor([sample.messages for sample in samples], train=True)
    media = batch["media"][SLOT]
    with torch.no_grad():
        seen = model.part(SLOT)(pixel_values=media["pixel_values"])
        nothing = Features(torch.zeros_like(seen.values), seen.mask, seen.positions)
        tokens = model.part("image.projector")(nothing)
        embeds = inject(model.backbone.embed(batch["input_ids"]), media["spans"], tokens, SLOT)
        hidden = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).hidden
        terms = [
            text_loss(hidden[[i]], batch["labels"][[i]], model.backbone.logits) for i in range(4)
        ]
    by_hand = np.mean([float(term.sum / term.count) for term in terms])
    assert record["zeroed"]["loss"] == pytest.approx(by_hand, abs=1e-5)
    assert abs(record["zeroed"]["delta"]) > 1e-3


def test_a_projector_of_zeros_is_blind():
    model, processor = compose()
    with torch.no_grad():
        for parameter in model.part("image.projector").parameters():
            parameter.zero_()
    record = evaluate_seeing(model, processor, questions(range(6)), batch_size=4)
    for name in ("shuffled", "zeroed", "noised"):
        assert record[name]["delta"] == 0
        assert record[name]["wins"] == 0.5
    assert record["passed"] is False


@pytest.mark.parametrize("projector", ["{use: perceiver, preset: tiny}", "{use: mlp}"])
def test_images_of_other_shapes_change_places_where_their_length_is_the_same(projector):
    model, processor = compose(NATIVE, f"image.projector={projector}")
    # 16, 15, 16 and 12 patches; the perceiver makes the same number of positions of each.
    sizes = [(40, 40), (24, 40), (32, 128), (80, 80), (24, 32), (40, 24)]
    samples = [about(picture(seed, *size)[0], answer=f"{seed}") for seed, size in enumerate(sizes)]
    lengths = [processor.plan(s.messages, train=True).spans[0].length for s in samples]
    fits = [
        any(length == other for j, other in enumerate(lengths) if j != i)
        for i, length in enumerate(lengths)
    ]
    first, *others = (
        evaluate_seeing(model, processor, samples, batch_size=size) for size in (1, 4, 6)
    )
    assert first["shuffled"]["samples"] == sum(fits)
    assert first["not_shuffled"] == 6 - sum(fits)
    assert (first["not_shuffled"] == 0) == ("perceiver" in projector)
    for other in others:
        for name in ("shuffled", "zeroed", "noised"):
            for key in ("loss", "delta", "interval"):
                assert other[name][key] == pytest.approx(first[name][key], abs=1e-5)


def test_only_the_chosen_slots_are_replaced():
    with toy_installed():
        model, processor = compose(
            "signal={encoder: {use: signal-encoder}, projector: {use: signal-projector}}",
            plugins="llm,vision,toy",
        )
        signals = [np.full(4, value, np.float32) for value in (0.0, 1.0, 2.0, 3.0)]
        samples = questions(range(4))
        for sample, signal in zip(samples, signals, strict=True):
            sample.messages[0]["content"].append({"type": "signal", "signal": signal})
        with torch.no_grad():
            for parameter in model.part("signal.projector").parameters():
                parameter.zero_()
        signal = evaluate_seeing(model, processor, samples, slots=["signal.encoder"])
        image = evaluate_seeing(model, processor, samples, slots=[SLOT])
        both = evaluate_seeing(model, processor, samples)
    for name in ("shuffled", "zeroed", "noised"):
        assert signal[name]["delta"] == 0
        assert abs(image[name]["delta"]) > 1e-4
    assert both["zeroed"]["delta"] == pytest.approx(image["zeroed"]["delta"], abs=1e-6)


def test_a_model_that_has_learned_to_see_passes_and_before_it_does_not():
    model, processor = compose()
    held_out = questions(range(1000, 1024))
    gates = {"shuffled": Gate(), "zeroed": Gate(), "noised": Gate()}
    assert evaluate_seeing(model, processor, held_out, gates=gates)["passed"] is False
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(25):
        messages = [s.messages for s in questions(range(12 * step, 12 * step + 12))]
        model(**processor(messages, train=True)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    record = evaluate_seeing(model, processor, held_out, gates=gates)
    assert record["passed"], record
    assert model.training
    answers = evaluate_answers(
        model, processor, held_out, controls=["zeroed", "shuffled"], max_new_tokens=8
    )
    assert answers["score"] >= 0.9
    assert answers["chance"] == 0.25
    assert answers["controls"]["zeroed"]["score"] <= 0.5
    assert answers["controls"]["shuffled"]["score"] <= 0.1
