"""xoron-moe computes the same with every attention kernel, chosen as transformers chooses them.

By `attn_implementation` and `set_attn_implementation`, also inside a composed model: logits,
gradients, padding, packed documents and generated text with each cache, for grouped-query and
latent attention with values narrower and wider than keys. Blockwise at 16,384 positions is full
attention; in half precision the whole model stays finite where plain scores overflow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import xoron_core
from xoron_core.errors import SequenceError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LATENT: dict[str, Any] = {
    "attention": "latent",
    "num_key_value_heads": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
FORMS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "latent": LATENT,
    "narrow-value": {**LATENT, "v_head_dim": 12},
    "wide-value": {**LATENT, "v_head_dim": 20},
}
KERNELS = ("eager", "blockwise", "flex_attention")


@pytest.fixture(params=FORMS)
def model(request, make):
    return make(**FORMS[request.param])


def _batches(ids) -> dict[str, dict[str, torch.Tensor]]:
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    documents = torch.tensor([[1] * 6 + [2] * 8, [1] * 3 + [2] * 4 + [3] * 5 + [0] * 2])
    plain = {"input_ids": ids(2, 14)}
    return {
        "plain": plain,
        "padded": {**plain, "attention_mask": mask},
        "packed": {**plain, "document_ids": documents},
    }


@pytest.mark.parametrize("name", KERNELS)
def test_logits_and_gradients_are_those_of_sdpa(name: str, model, ids) -> None:
    recorded = name != "flex_attention"  # which has no backward on a CPU
    names = [n for n, _ in model.named_parameters()]
    for what, batch in _batches(ids).items():
        valid = batch.get("attention_mask", batch.get("document_ids", batch["input_ids"])) != 0
        model.set_attn_implementation("sdpa")
        expected = model(**batch).logits
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        if name == "blockwise" and what != "plain":
            with pytest.raises(SequenceError, match="keeps nothing apart"):
                model(**batch)
            continue
        with torch.set_grad_enabled(recorded):
            got = model(**batch).logits
        torch.testing.assert_close(got[valid], expected[valid], **CLOSE)
        if recorded:
            wanted = torch.autograd.grad(expected[valid].square().mean(), model.parameters())
            grads = torch.autograd.grad(got[valid].square().mean(), model.parameters())
            for parameter, gradient, right in zip(names, grads, wanted, strict=True):
                torch.testing.assert_close(gradient, right, msg=parameter, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "static"),
    [(name, False) for name in KERNELS]
    + [(name, True) for name in KERNELS if name != "flex_attention"],
)
def test_generated_text_is_that_of_sdpa(name: str, static: bool, model, ids) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    if name != "blockwise":
        mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(ids(2, 9), **options)
    model.set_attn_implementation(name)
    if static:
        options["cache_implementation"] = "static"
    assert torch.equal(model.generate(ids(2, 9), **options), expected)


@torch.no_grad()
def test_the_kernel_is_really_another_one(tmp_path, make, ids, monkeypatch) -> None:
    made = make(attn_implementation="blockwise")
    calls: list[int] = []
    monkeypatch.setattr("xoron_core.nn.blockwise.block_forward", _counting(calls))
    made(ids(1, 8))
    assert calls == [8] * 4
    made.set_attn_implementation("sdpa")
    made(ids(1, 8))
    assert len(calls) == 4
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blockwise")
    loaded(ids(1, 8))
    assert len(calls) == 8
    with pytest.raises(ValueError, match="not supported"):
        made.set_attn_implementation("no-such-kernel")


def _counting(calls: list[int]) -> Any:
    from xoron_core.nn.blockwise import block_forward

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(q.shape[2])
        return block_forward(q, *args, **kwargs)

    return counted


@torch.no_grad()
def test_it_is_set_on_a_composed_model(ids) -> None:
    model, _ = xoron_core.compose(preset="tiny", plugins=["llm"])
    model.eval()
    expected = model(input_ids=ids(1, 9)).logits
    for name in ("eager", "blockwise", "sdpa"):
        model.set_attn_implementation(name)
        assert model.backbone.model.config._attn_implementation == name
        torch.testing.assert_close(model(input_ids=ids(1, 9)).logits, expected, **CLOSE)


@torch.no_grad()
def test_blockwise_serves_any_model_of_transformers(sizes, ids) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected, text = model(ids(2, 9)).logits, model.generate(ids(2, 9), **options)
    model.set_attn_implementation("blockwise")
    torch.testing.assert_close(model(ids(2, 9)).logits, expected, **CLOSE)
    assert torch.equal(model.generate(ids(2, 9), **options), text)
    static = model.generate(ids(2, 9), cache_implementation="static", **options)
    assert torch.equal(static, text)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(SequenceError, match="keeps nothing apart"):
        model(ids(2, 9), attention_mask=mask)


def test_blockwise_is_full_attention_at_16k(make, ids) -> None:
    changes = {"num_hidden_layers": 1, "use_moe": False, "num_attention_heads": 2}
    model = make(**{**LATENT, **changes, "max_position_embeddings": 16384, "v_head_dim": 16})
    x = ids(1, 16384)
    results = {}
    for name in ("sdpa", "blockwise"):
        model.set_attn_implementation(name)
        hidden = model.model(x).last_hidden_state
        loss = hidden.square().mean() + hidden[:, -1].sum()
        results[name] = hidden.detach(), torch.autograd.grad(loss, model.model.parameters())
    (full, wanted), (pieces, grads) = results["sdpa"], results["blockwise"]
    assert (pieces - full).abs().max() < 1e-5 * full.abs().max()
    for gradient, right in zip(grads, wanted, strict=True):
        assert (gradient - right).abs().max() < 1e-4 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_never_on_the_math_kernel(dtype: torch.dtype, model, ids) -> None:
    model.to(dtype)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for batch in _batches(ids).values():
            model(**batch).logits.sum().backward()
        with torch.no_grad():
            model.generate(ids(2, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    names = {event.key for event in seen.key_averages()}
    assert any("scaled_dot_product_flash_attention" in name for name in names)
    assert not any("attention_math" in name for name in names)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["gqa", "latent"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "blockwise", "flex_attention"])
def test_half_precision_stays_finite_where_plain_scores_overflow(
    name: str, form: str, dtype: torch.dtype, make, ids, monkeypatch
) -> None:
    """Prefill and decoding, absorbed for latent attention, with experts and all."""
    model, exact = (make(**FORMS[form], num_hidden_layers=2) for _ in range(2))
    # bf16 overflows nowhere, but would round scores of this size to something else.
    larger = 100 if dtype == torch.float16 else 3
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(larger)
        if form == "latent":
            attention.kv_b_proj.weight.unflatten(0, (4, 24))[:, :8].mul_(larger)
        else:
            attention.k_proj.weight.mul_(larger)
    x = ids(2, 12)
    model.to(dtype)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    monkeypatch.setitem(AttentionInterface._global_mapping, "naive", _naive)
    model.set_attn_implementation("naive")
    assert model(x).logits.isfinite().all() == (dtype == torch.bfloat16)
    model.set_attn_implementation(name)
    first = model(x[:, :10], use_cache=True)
    rest = model(x[:, 10:], past_key_values=first.past_key_values)
    got, expected = torch.cat([first.logits, rest.logits], 1), exact(x).logits
    assert got.isfinite().all()
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (0.005 if dtype == torch.float16 else 0.04)


def _naive(module, query, key, value, attention_mask, scaling, **kwargs):
    """The formula as it is written: the scores are scaled when they have overflowed."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = (query @ key.mT) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2), None
