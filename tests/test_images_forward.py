"""Proves the published form: `model(input_ids, images=...)` is the processor's batch bit for bit,
with labels, padding, touching images and in `generate`; and images that do not match the
placeholders are an error with both numbers, in this form and in the ordinary one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import xoron_core
from xoron_core.errors import PluginError, SequenceError
from xoron_core.placeholders import find_runs

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")

SLOT = "image.encoder"
K = 16
NAFLEX = (
    "image.encoder={use: siglip, vision_config: {model_type: siglip2_vision_model, hidden_size: 32,"
    " intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_patches: 16,"
    " patch_size: 8}}"
)


def compose(*overrides, plugins="llm,vision"):
    options = ["backbone.num_layers=2", *overrides]
    return xoron_core.compose(plugins=plugins, preset="tiny", overrides=options)


@pytest.fixture(scope="module")
def composed():
    return compose()


@pytest.fixture(scope="module")
def variable():
    """Each image has as many positions as patches: 12 or 16."""
    return compose(NAFLEX, "image.projector={use: mlp}")


def picture(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    )


def ask(*parts):
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
        for p in parts
    ]
    return [{"role": "user", "content": content}]


def pixels(batch):
    return {name: t for name, t in batch["media"][SLOT].items() if name not in ("spans", "counts")}


def without_media(batch):
    return {name: value for name, value in batch.items() if name != "media"}


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


TALKS = [
    ask("a ", picture(0), " b ", picture(1)),
    ask("long text before it ", picture(2), " and after"),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pixels_and_pictures_beside_ids_are_the_processors_batch(composed, side):
    model, processor = composed
    batch = processor(TALKS, padding_side=side)
    assert not batch["attention_mask"].all()
    want = logits(model, **batch)
    plain = without_media(batch)
    forms = {
        "pixel values": pixels(batch)["pixel_values"],
        "arrays": [picture(0), picture(1), picture(2)],
        "PIL": tuple(Image.fromarray(picture(k)) for k in range(3)),
    }
    for name, images in forms.items():
        assert torch.equal(logits(model, **plain, images=images), want), name
    swapped = forms["pixel values"][[1, 0, 2]]
    assert not torch.equal(logits(model, **plain, images=swapped), want)
    one = processor(ask(picture(0)))
    want = logits(model, **one)
    assert torch.equal(logits(model, **without_media(one), images=picture(0)), want)


def test_a_file_works_too(composed, tmp_path):
    model, processor = composed
    Image.fromarray(picture(3)).save(tmp_path / "a.png")
    batch = processor(ask(picture(3), "?"))
    got = logits(model, **without_media(batch), images=tmp_path / "a.png")
    assert torch.equal(got, logits(model, **batch))


def test_labels_give_the_same_loss_and_gradients(composed):
    model, processor = composed
    talks = [[*talk, {"role": "assistant", "content": "yes"}] for talk in TALKS]
    batch = processor(talks, train=True)
    found = []
    for inputs in (batch, {**without_media(batch), "images": pixels(batch)["pixel_values"]}):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        grads = [p.grad.clone() for p in model.part("image.projector").parameters()]
        found.append((output.loss, *grads))
    model.zero_grad()
    assert all(map(torch.equal, *found))
    assert any(grad.any() for grad in found[0][1:])


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generate_takes_images(composed, more):
    model, processor = composed
    batch = processor(TALKS)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **more}
    want = model.generate(**batch, **options)
    plain, given = without_media(batch), pixels(batch)["pixel_values"]
    assert torch.equal(model.generate(**plain, images=given, **options), want)
    ids = plain.pop("input_ids")
    assert torch.equal(model.generate(ids, images=given, **plain, **options), want)
    text = model.generate_text(ids, images=given, **plain, **options)
    assert torch.equal(text, want)


def glued(processor, space, *pictures):
    """Ids in which images touch: no marker stands between them, and the batch with their spans."""
    batch = processor(ask("see ", *pictures, " ."))
    spans = batch["media"][SLOT]["spans"]
    begin, end = space.id_of("<|image|>"), space.id_of("<|/image|>")
    ids = batch["input_ids"][0]
    first, last = int(spans[0, 1]), int(spans[-1, 1] + spans[-1, 2])
    inside = ids[first:last]
    kept = torch.cat([ids[:first], inside[(inside != begin) & (inside != end)], ids[last:]])[None]
    lengths = spans[:, 2]
    starts = first + lengths.cumsum(0) - lengths
    placed = torch.stack([torch.zeros_like(starts), starts, lengths], dim=-1)
    return kept, {SLOT: {**batch["media"][SLOT], "spans": placed}}


def test_images_that_touch_are_cut_by_what_each_takes(composed, variable):
    for model, processor in (composed, variable):
        pictures = picture(0, 48, 64), picture(1, 32, 32), picture(2, 64, 48)
        ids, media = glued(processor, model.space, *pictures)
        assert len(find_runs(ids == model.space.id_of("<|image_pad|>"))) == 1
        want = logits(model, input_ids=ids, media=media)
        for images in (list(pictures), pixels({"media": media})):
            assert torch.equal(logits(model, input_ids=ids, images=images), want)
    assert len(set(media[SLOT]["spans"][:, 2].tolist())) == 2


def test_native_aspect_tensors_come_by_name(variable):
    model, processor = variable
    batch = processor(ask(picture(0, 48, 64), picture(1, 32, 32)))
    want = logits(model, **batch)
    plain = without_media(batch)
    assert torch.equal(logits(model, **plain, images=pixels(batch)), want)
    with pytest.raises(
        SequenceError, match=r"several tensors \(pixel_values, pixel_attention_mask"
    ):
        model(**plain, images=pixels(batch)["pixel_values"])


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_one_image_too_many_or_few_names_both_counts(composed, form):
    model, processor = composed
    batch = processor(TALKS)
    plain = without_media(batch)
    for number in (0, 1, 2, 4):
        images = [picture(k) for k in range(number)]
        if form == "tensor":
            images = torch.zeros(number, *pixels(batch)["pixel_values"].shape[1:])
        said = (
            f"{number} images take {K * number} positions, but input_ids hold {3 * K} .* in 3 spans"
        )
        with pytest.raises(SequenceError, match=said):
            model(**plain, images=images)
    none = processor(ask("no image"))
    with pytest.raises(SequenceError, match=r"1 images take 16 positions, .* hold 0 .* in 0 spans"):
        model(**none, images=[picture(0)])
    assert torch.equal(logits(model, **none, images=[]), logits(model, **none))


@pytest.mark.parametrize("change", [-(K - 1), -1, 1])
def test_one_placeholder_too_many_or_few_names_both_counts(composed, change):
    """A single placeholder is one position too, and is not widened."""
    model, processor = composed
    batch = processor(ask("see ", picture(0), " here"))
    ids, (_, start, length) = batch["input_ids"], batch["media"][SLOT]["spans"][0].tolist()
    pad = ids.new_full((1, length + change), int(ids[0, start]))
    changed = torch.cat([ids[:, :start], pad, ids[:, start + length :]], dim=1)
    for images in (pixels(batch)["pixel_values"], [picture(0)]):
        with pytest.raises(SequenceError, match=f"takes {K} positions but .* has {K + change}"):
            model(input_ids=changed, images=images)


def test_a_placeholder_without_medium_is_an_error_in_the_ordinary_form(composed):
    model, processor = composed
    batch = processor(ask("see ", picture(0), " here"))
    ids = batch["input_ids"].clone()
    ids[0, 0] = model.space.id_of("<|image_pad|>")
    with pytest.raises(SequenceError, match=f"has {K + 1} .* but media fill {K} of them"):
        model(input_ids=ids, media=batch["media"])


def test_media_that_nothing_would_read_are_refused(composed):
    model, processor = composed
    batch = processor(ask("see ", picture(0)))
    loose = {SLOT: pixels(batch)}
    with pytest.raises(SequenceError, match="no spans say where they stand"):
        model(input_ids=batch["input_ids"], media=loose)
    with pytest.raises(SequenceError, match="given twice"):
        model(**batch, images=pixels(batch)["pixel_values"])
    with pytest.raises(SequenceError, match=r"call model\.encode\(images\)"):
        model(images=pixels(batch)["pixel_values"])
    with pytest.raises(SequenceError, match=r"expected a tensor of 4 axes.*got \(3, 64, 64\)"):
        model(**without_media(batch), images=pixels(batch)["pixel_values"][0])
    blind, processor = compose(plugins="llm")
    with pytest.raises(PluginError, match="pip install xoron-vision"):
        blind(**processor(ask("hi")), images=[picture(0)])


def test_runs_are_what_a_loop_finds():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = torch.rand(3, 9, generator=rng) < 0.6
        want = []
        for row in range(3):
            start = None
            for column in range(10):
                inside = column < 9 and bool(mask[row, column])
                if inside and start is None:
                    start = column
                elif not inside and start is not None:
                    want.append([row, start, column - start])
                    start = None
        assert find_runs(mask).tolist() == want
