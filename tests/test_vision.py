"""Proves that a language model sees images: each stands where it was put, and nothing else moves.

Tiny models of random weights. Every equality is between two different paths, and every test that
something does not matter has a control in which something else does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xoron_core
from xoron_core.errors import CompositionError, DataError, PluginError, SequenceError
from xoron_core.media import embed
from xoron_core.sampling import text_rows
from xoron_core.session import Session

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")

SLOT = "image.encoder"


def compose(*overrides, **more):
    return xoron_core.compose(
        plugins="llm,vision", preset="tiny", overrides=["backbone.num_layers=2", *overrides], **more
    )


@pytest.fixture(scope="module")
def composed():
    return compose()


def picture(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def ask(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_two_images_give_different_logits_and_the_same_one_the_same(composed):
    model, processor = composed
    first, again, other = (logits(model, processor(ask("what? ", picture(k)))) for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4


def test_without_an_image_the_backbone_is_what_it_is_alone(composed):
    model, processor = composed
    batch = processor(ask("what?"))
    alone = model.backbone.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(logits(model, batch), alone.logits)


def test_placeholder_rows_are_the_projectors_output_bit_for_bit(composed):
    model, processor = composed
    batch = processor([ask(picture(0), " and ", picture(1)), ask("one ", picture(2))])
    media = batch["media"][SLOT]
    assert media["spans"][:, 0].tolist() == [0, 0, 1]
    embeds = embed(model, batch["media"], input_ids=batch["input_ids"]).embeds
    plain = model.backbone.embed(batch["input_ids"])
    with torch.no_grad():
        features = model.part(SLOT)(pixel_values=media["pixel_values"])
        tokens = model.part("image.projector")(features).values
    touched = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for item, (row, start, length) in enumerate(media["spans"].tolist()):
        assert torch.equal(embeds[row, start : start + length], tokens[item])
        touched[row, start : start + length] = True
    assert torch.equal(embeds[~touched], plain[~touched])


def test_swapping_two_images_swaps_exactly_their_blocks(composed):
    model, processor = composed
    a, b = picture(0), picture(1)
    one, two = processor(ask(a, " vs ", b)), processor(ask(b, " vs ", a))
    assert torch.equal(one["input_ids"], two["input_ids"])
    first, second = (
        embed(model, t["media"], input_ids=t["input_ids"]).embeds[0] for t in (one, two)
    )
    (_, s, n), (_, t, m) = one["media"][SLOT]["spans"].tolist()
    assert n == m
    # One batch of (a, b) and one of (b, a): kernels may round rows of a batch differently.
    torch.testing.assert_close(first[s : s + n], second[t : t + n], rtol=0, atol=1e-5)
    torch.testing.assert_close(first[t : t + n], second[s : s + n], rtol=0, atol=1e-5)
    assert (first[s : s + n] - second[s : s + n]).abs().max() > 1e-3
    outside = torch.ones(len(first), dtype=torch.bool)
    outside[s : s + n] = outside[t : t + n] = False
    assert torch.equal(first[outside], second[outside])


@pytest.mark.parametrize("projector", ["{use: perceiver, preset: tiny}", "{use: mlp}"])
@pytest.mark.parametrize("change", [1, -1])
def test_one_placeholder_too_many_or_few_names_both_counts(projector, change):
    model, processor = compose(f"image.projector={projector}")
    batch = processor(ask("see ", picture(0), " here"))
    spans = batch["media"][SLOT]["spans"]
    right = int(spans[0, 2])
    spans[0, 2] += change
    with pytest.raises(SequenceError, match=f"takes {right} positions .* has {right + change}"):
        model(**batch)


def test_images_and_placeholders_that_differ_in_number_are_an_error(composed):
    model, processor = composed
    batch = processor(ask(picture(0), picture(1)))
    batch["media"][SLOT]["spans"] = batch["media"][SLOT]["spans"][:1]
    with pytest.raises(
        SequenceError, match="1 placeholder spans in the sequence but 2 media items"
    ):
        model(**batch)


def test_an_image_costs_its_positions_and_two_markers(composed):
    _, processor = composed
    plain, seen = (processor(ask("a", *images))["input_ids"] for images in ((), (picture(0),)))
    assert seen.shape[1] - plain.shape[1] == 16 + 2
    strings = processor.tokenizer.convert_ids_to_tokens(seen[0])
    start = strings.index("<|image|>")
    assert strings[start + 1 : start + 18] == ["<|image_pad|>"] * 16 + ["<|/image|>"]


def test_batched_generation_is_each_alone(composed):
    session = Session(*composed)
    talks = [ask("what is this? ", picture(0)), ask("hi"), ask(picture(1), picture(2), " both?")]
    together = session.generate(talks, max_new_tokens=10)
    alone = [session.generate([talk], max_new_tokens=10)[0] for talk in talks]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_decoding_with_a_cache_is_one_pass_over_the_whole(composed):
    model, processor = composed
    batch = processor(ask("what? ", picture(3)))
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        whole = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), media=batch["media"]
        ).logits
    N = batch["input_ids"].shape[1]
    allowed = whole[:, N - 1 : -1, : model.space.size]
    masked = torch.full_like(allowed, float("-inf"))
    rows = text_rows(model.space)
    masked[..., rows] = allowed[..., rows]
    picked = masked.gather(-1, ids[:, N:, None])[..., 0]
    assert (picked >= masked.amax(-1) - 1e-4).all()


def train(model, processor, steps):
    """Steps of an optimizer that was given every parameter, the frozen ones too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    talks = [
        [*ask("which? ", picture(k)), {"role": "assistant", "content": str(k)}] for k in range(4)
    ]
    batch = processor(talks, train=True)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=False)  # a gradient of zeros would let the decay in
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_frozen_tower_is_bit_identical_after_training_with_weight_decay():
    model, processor = compose("image.encoder.freeze=true")
    before = {name: p.detach().clone() for name, p in model.part(SLOT).named_parameters()}
    projector = [p.detach().clone() for p in model.part("image.projector").parameters()]
    losses = train(model, processor, 50)
    assert all(torch.equal(before[n], p) for n, p in model.part(SLOT).named_parameters())
    assert not any(map(torch.equal, projector, model.part("image.projector").parameters()))
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])


def test_a_tower_that_is_not_frozen_moves():
    model, processor = compose()
    before = {name: p.detach().clone() for name, p in model.part(SLOT).named_parameters()}
    train(model, processor, 1)
    still = [n for n, p in model.part(SLOT).named_parameters() if torch.equal(before[n], p)]
    assert still == []


def test_text_alone_in_training_gives_the_connector_a_zero_gradient_and_an_image_another(composed):
    model, processor = composed
    model.train()
    grads = []
    for parts in (("hi",), ("hi", picture(0))):
        model.zero_grad()
        talk = [*ask(*parts), {"role": "assistant", "content": "b"}]
        model(**processor(talk, train=True)).loss.backward()
        grads.append([p.grad for p in model.part("image.projector").parameters()])
    model.zero_grad()
    model.eval()
    assert all(grad is not None and not grad.any() for grad in grads[0])
    assert all(grad is not None and grad.any() for grad in grads[1])


def test_a_budget_shortens_the_sequence_and_keeps_the_first_positions(composed):
    model, processor = composed
    image = picture(0)
    whole = processor(ask("what? ", image))
    full = embed(model, whole["media"], input_ids=whole["input_ids"]).embeds
    ((_, start, _),) = whole["media"][SLOT]["spans"].tolist()
    try:
        for budget in (4, 8, 16):
            processor.budgets["image.projector"] = budget
            batch = processor([ask("what? ", image), ask("no")])
            assert batch["media"][SLOT]["spans"][0, 2] == budget
            embeds = embed(model, batch["media"], input_ids=batch["input_ids"]).embeds
            ((_, here, _),) = batch["media"][SLOT]["spans"].tolist()
            torch.testing.assert_close(
                embeds[0, here : here + budget], full[0, start : start + budget], rtol=0, atol=1e-5
            )
        processor.budgets["image.projector"] = 17
        with pytest.raises(SequenceError, match="makes 1 to 16"):
            model(**processor(ask(image)))
    finally:
        processor.budgets.clear()


def test_a_budget_for_a_projector_without_one_is_refused():
    _, processor = compose("image.projector={use: mlp}")
    processor.budgets["image.projector"] = 4
    with pytest.raises(SequenceError, match="a budget of 4 positions was set, but MlpProjector"):
        processor(ask(picture(0)))


def test_a_fusion_starts_as_the_model_without_it_and_then_looks_at_the_image(composed):
    model, processor = composed
    fused, _ = compose("fusion={use: cross-attention, preset: tiny}")
    batch = processor([ask("what? ", picture(0)), ask("no image")])
    assert torch.equal(logits(fused, batch), logits(model, batch))
    with torch.no_grad():
        for parameter in fused.fusion.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    apart = (logits(fused, batch) - logits(model, batch)).abs().amax(-1)
    assert apart[0].max() > 1e-3
    assert not apart[1][batch["attention_mask"][1].bool()].any()


@pytest.mark.parametrize(
    "projector",
    ["{use: mlp}", "{use: pixel-shuffle}", "{use: spatial, factor: 4}",
     "{use: c-abstractor, preset: tiny}", "{use: perceiver-mlp, preset: tiny}"],
)  # fmt: skip
def test_every_projector_composes_saves_and_loads_to_the_same_logits(projector, tmp_path):
    model, processor = compose(f"image.projector={projector}")
    batch = processor([ask("a ", picture(0)), ask(picture(1), picture(2))])
    want = logits(model, batch)
    xoron_core.save(model, processor, tmp_path / "m")
    loaded, again = xoron_core.load(tmp_path / "m")
    same = again([ask("a ", picture(0)), ask(picture(1), picture(2))])
    assert torch.equal(same["input_ids"], batch["input_ids"])
    assert torch.equal(logits(loaded, same), want)


def test_the_xoron_encoder_and_a_native_tower_compose_with_a_backbone():
    naflex = (
        "{use: siglip, vision_config: {model_type: siglip2_vision_model, hidden_size: 32,"
        " intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_patches: 16,"
        " patch_size: 8}}"
    )
    for encoder, projector, counts in (
        ("{use: xoron-vision, preset: tiny}", "{use: perceiver, preset: tiny}", {16}),
        (naflex, "{use: mlp}", {12, 16}),
    ):
        model, processor = compose(f"image.encoder={encoder}", f"image.projector={projector}")
        batch = processor([ask(picture(0, 48, 64), picture(1, 32, 32)), ask(picture(2, 64, 48))])
        assert set(batch["media"][SLOT]["spans"][:, 2].tolist()) == counts
        assert torch.isfinite(logits(model, batch)).all()


def test_a_broken_image_in_a_message_names_its_file(composed, tmp_path):
    _, processor = composed
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"cat\.png"):
        processor(ask("what? ", tmp_path / "cat.png"))
    with pytest.raises(DataError, match="URLs are not fetched unless allowed"):
        processor(ask("what? ", {"url": "https://example.org/cat.png"}))


def test_openai_image_parts_are_images_too(composed):
    _, processor = composed
    import base64
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture(0)).save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    batch = processor([{"role": "user", "content": [{"type": "text", "text": "what? "}, part]}])
    want = processor(ask("what? ", picture(0)))
    assert torch.equal(batch["input_ids"], want["input_ids"])
    pixels = [b["media"][SLOT]["pixel_values"] for b in (batch, want)]
    assert torch.equal(*pixels)


def test_a_projector_without_grid_is_refused_when_planned():
    with pytest.raises(CompositionError, match="needs features on a grid"):
        compose("image.encoder={use: xoron-vision, preset: tiny}", "image.projector={use: spatial}")


def test_an_answer_with_an_image_names_what_could_make_one(composed):
    _, processor = composed
    talk = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": ask(picture(0))[0]["content"]},
    ]
    with pytest.raises(PluginError, match="nothing in this composition makes image"):
        processor(talk, train=True)
