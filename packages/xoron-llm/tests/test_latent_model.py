"""xoron-moe with latent attention computes the same however it is asked.

With dynamic and static cache and without, by beams, after cropping, padded and alone, packed and
apart, with positions on three axes; the cache holds r + d_rope numbers per token and layer in
memory that grows in place, and `cache_width` says so.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache

from xoron_core.components import Context
from xoron_core.errors import ConfigError
from xoron_core.tokens.space import TextBase, TokenSpace
from xoron_llm.backbone import XoronMoeBackbone
from xoron_llm.moe.cache import GrowingLayer
from xoron_llm.moe.config import MoeConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded-value": {"v_head_dim": 20},
    "yarn": {
        "q_lora_rank": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}


@pytest.fixture
def latent(make):
    def build(**changes: Any) -> Any:
        sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        return make(attention="latent", num_key_value_heads=None, **{**sizes, **changes})

    return build


@pytest.fixture(params=FORMS)
def model(request, latent):
    return latent(**FORMS[request.param])


def _cache(model: Any, kind: str) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=24)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "dynamic-without-config", "static"])
@pytest.mark.parametrize("steps", [[20], [9, 1, 1, 2, 7], [1] * 20])
def test_cached_logits_equal_uncached(steps: list[int], kind: str, model, ids) -> None:
    x, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(x, attention_mask=mask).logits
    cache, done, got = _cache(model, kind), 0, []
    for step in steps:
        out = model(
            x[:, done : done + step],
            attention_mask=mask[:, : done + step],
            past_key_values=cache,
            use_cache=True,
        )
        got.append(out.logits)
        done += step
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_greedy_text_is_the_same_with_each_cache_and_without(model, ids) -> None:
    x, mask = ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0
    wanted = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    plain = model.generate(x, use_cache=False, **wanted)
    assert len(set(plain[:, 6:].flatten().tolist())) > 5
    assert torch.equal(model.generate(x, use_cache=True, **wanted), plain)
    assert torch.equal(model.generate(x, cache_implementation="static", **wanted), plain)


@torch.no_grad()
def test_beams_reorder_the_cache(model, ids) -> None:
    x = ids(2, 5)
    wanted = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(x, use_cache=True, **wanted)
    assert torch.equal(cached, model.generate(x, use_cache=False, **wanted))


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True])
def test_a_cropped_cache_goes_on(copied: bool, model, ids) -> None:
    x, other = ids(1, 12), ids(1, 12, seed=7)
    cache = model(x, use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :5, :], layer.values[..., :5, :]
    mixed = torch.cat([x[:, :5], other[:, 5:]], 1)
    got = model(mixed[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(mixed).logits[:, 5:], **CLOSE)
    if copied:
        more = torch.cat([x, other[:, :1]], 1)
        got = model(other[:, :1], past_key_values=kept).logits
        torch.testing.assert_close(got, model(more).logits[:, -1:], **CLOSE)


@torch.no_grad()
def test_the_cache_grows_in_place_and_holds_the_declared_width(latent, ids) -> None:
    model, x = latent(), ids(2, 100)
    cache = model(x[:, :20], use_cache=True).past_key_values
    places: set[int] = set()
    for n in range(20, 100):
        model(x[:, n : n + 1], past_key_values=cache, use_cache=True)
        layer = cache.layers[0]
        assert type(layer) is GrowingLayer
        assert layer.keys.shape == (2, 1, n + 1, 32)
        places.add(layer.keys.data_ptr())
    assert len(places) < 5
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    config = MoeConfig.parse(
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention": "latent",
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
        }
    )
    space = TokenSpace.allocate(
        text=TextBase(name="test/base", size=64, identity="sha256:test"), groups=[]
    )
    backbone = XoronMoeBackbone(config, Context("backbone", space=space))
    assert backbone.cache_width() == (24 + 8) * 4 == held / (2 * 100 * 4)


def test_gradients_pass_through_a_cache(latent, ids) -> None:
    model, x = latent(), ids(1, 9)
    embeds = model.model.embed_tokens(x).detach().requires_grad_()
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeds[:, :6], past_key_values=cache, use_cache=True)
    out = model(inputs_embeds=embeds[:, 6:], past_key_values=cache, use_cache=True).logits
    (cached,) = torch.autograd.grad(out.square().sum(), embeds)
    expected = model(inputs_embeds=embeds).logits[:, 6:]
    (whole,) = torch.autograd.grad(expected.square().sum(), embeds)
    assert whole[:, :6].abs().max() > 0
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_filled_in_inference_mode_goes_on_outside(latent, ids) -> None:
    model, x = latent(), ids(1, 8)
    with torch.inference_mode():
        cache = model(x[:, :5], use_cache=True).past_key_values
    got = model(x[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(x).logits[:, 5:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(side: str, model, ids) -> None:
    lengths = [11, 4, 1]
    rows = [ids(1, n, seed=n) for n in lengths]
    x, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        where = slice(11 - n, 11) if side == "left" else slice(0, n)
        x[b, where], mask[b, where] = row[0], 1
    logits = model(x, attention_mask=mask).logits
    assert logits.isfinite().all()
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b][mask[b].bool()], model(row).logits[0], **CLOSE)


def test_a_masked_token_changes_nothing_and_gets_no_gradient(model, ids) -> None:
    x, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = mask[1, 8:] = 0
    embeddings = model.model.embed_tokens(x).detach().requires_grad_()
    valid = mask.bool()
    out = model(inputs_embeds=embeddings, attention_mask=mask).logits
    changed = model(x.masked_fill(mask == 0, 5), attention_mask=mask).logits
    torch.testing.assert_close(changed[valid], out[valid], rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(out[valid].square().sum(), embeddings)
    assert gradient.isfinite().all()
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().min(-1).values.max() > 0


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model, ids) -> None:
    parts = [ids(1, n, seed=n) for n in (5, 1, 7)]
    packed = torch.cat([*parts, torch.zeros(1, 3, dtype=torch.long)], 1)
    documents = torch.tensor([[1] * 5 + [2] + [3] * 7 + [0] * 3])
    logits = model(packed, document_ids=documents).logits
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        torch.testing.assert_close(logits[:, start:stop], model(part).logits, **CLOSE)
        start = stop
    assert (model(packed).logits[:, 5:13] - logits[:, 5:13]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "latent"])
def test_positions_on_three_axes_are_plain_ones_on_text(attention: str, make, ids) -> None:
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    sizes |= {"num_key_value_heads": None, "attention": attention}
    plain, model, x = make(**sizes), make(**sizes, mrope_section=(2, 1, 1)), ids(2, 9)
    flat = torch.arange(9).expand(2, -1)
    expected = plain(x).logits
    three = flat.expand(3, -1, -1).clone()
    torch.testing.assert_close(model(x, position_ids=three).logits, expected, **CLOSE)
    torch.testing.assert_close(model(x).logits, expected, **CLOSE)
    three[1, :, 4:] += 9
    assert (model(x, position_ids=three).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_decoding_absorbs_an_adapter_of_the_expanded_projection(latent, ids) -> None:
    lora = LoraConfig(r=4, target_modules=["kv_b_proj"], task_type="CAUSAL_LM")
    model, x = get_peft_model(latent(), lora).eval(), ids(1, 8)
    before = model(x).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5)
    expected = model(x).logits
    assert (expected - before).abs().max() > 1e-2
    cache = model(x[:, :5], use_cache=True).past_key_values
    steps = [model(x[:, n : n + 1], past_key_values=cache).logits for n in range(5, 8)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 5:], **CLOSE)


@torch.no_grad()
def test_longrope_chooses_its_factors_by_the_row(latent, ids) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 10,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    model, x = latent(rope_parameters=rope), ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0  # a row of nine tokens beside one of twelve
    together = model(x, attention_mask=mask).logits
    torch.testing.assert_close(together[1, 3:], model(x[1:, 3:]).logits[0], **CLOSE)
    stretched = latent(rope_parameters={**rope, "long_factor": [1.0, 1.0, 1.0, 1.0]})
    assert (stretched(x).logits - model(x).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7 .* even"),
        ({"num_heads": 4, "num_kv_heads": 2}, "one latent for all heads"),
        ({"mrope_section": [1, 1, 1]}, "must sum to half the rotated width, 16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embedding"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "has 1 numbers, expected 16",
        ),
        ({"first_k_dense_replace": 12}, "leaves no layer with experts"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeConfig.parse({"attention": "latent", **changes})
