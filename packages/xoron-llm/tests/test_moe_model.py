"""xoron-moe computes the same however it is asked.

With and without cache, padded and alone, packed and apart, with activations kept or recomputed;
and a model without experts is a Llama, logit for logit.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xoron_core.errors import SequenceError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def test_without_experts_it_is_a_llama(make, ids, sizes) -> None:
    ours = make(use_moe=False, tie_word_embeddings=False)
    config = LlamaConfig(**sizes, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None)
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    batch = {"input_ids": ids(3, 17), "attention_mask": torch.ones(3, 17, dtype=torch.long)}
    batch["attention_mask"][1, :6] = 0
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = batch["input_ids"].clone()
    labels[1, :7] = -100  # the first valid token is predicted from padding, which means nothing
    a = ours(**batch, labels=labels)
    b = theirs(**batch, position_ids=position_ids, labels=labels)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(a.logits[valid], b.logits[valid], **CLOSE)
    torch.testing.assert_close(a.loss, b.loss, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [[12], [7, 1, 1, 3], [1] * 12])
def test_cached_logits_equal_uncached(steps: list[int], static: bool, make, ids) -> None:
    model, x = make(), ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(x, attention_mask=mask).logits
    cache = (
        StaticCache(config=model.config, max_cache_len=16)
        if static
        else DynamicCache(config=model.config)
    )
    done, got = 0, []
    for step in steps:
        piece = slice(done, done + step)
        out = model(
            x[:, piece],
            attention_mask=mask[:, : done + step],
            past_key_values=cache,
            use_cache=True,
        )
        got.append(out.logits)
        done += step
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], **CLOSE)
    assert int(cache.get_seq_length()) == 12


@torch.no_grad()
def test_greedy_text_is_the_same_with_each_cache_and_without(make, ids) -> None:
    model, x = make(), ids(2, 6)
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(x, use_cache=False, **wanted)
    assert torch.equal(model.generate(x, use_cache=True, **wanted), plain)
    assert torch.equal(model.generate(x, cache_implementation="static", **wanted), plain)
    by_hand = x
    for _ in range(12):
        choice = model(by_hand, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        by_hand = torch.cat([by_hand, choice], 1)
    assert torch.equal(plain, by_hand)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(side: str, make, ids) -> None:
    model, lengths = make(), [11, 4, 1]
    rows = [ids(1, n, seed=n) for n in lengths]
    x, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        where = slice(11 - n, 11) if side == "left" else slice(0, n)
        x[b, where], mask[b, where] = row[0], 1
    logits = model(x, attention_mask=mask).logits
    assert logits.isfinite().all()
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b][mask[b].bool()], model(row).logits[0], **CLOSE)
    if side == "left":
        together = model.generate(
            x, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        for b, row in enumerate(rows):
            alone = model.generate(row, max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert torch.equal(together[b, -8:], alone[0, -8:])


def test_a_masked_token_changes_nothing_and_gets_no_gradient(make, ids) -> None:
    model, x = make(), ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = mask[1, 8:] = 0
    embeddings = model.model.embed_tokens(x).detach().requires_grad_()
    changed = x.masked_fill(mask == 0, 5)
    valid = mask.bool()
    out = model(inputs_embeds=embeddings, attention_mask=mask).logits
    # Bit for bit: padding reaches no expert, so that no expert multiplies another number of rows.
    assert torch.equal(model(changed, attention_mask=mask).logits[valid], out[valid])
    (gradient,) = torch.autograd.grad(out[valid].square().sum(), embeddings)
    assert gradient.isfinite().all()
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().min(-1).values.max() > 0


@torch.no_grad()
def test_packed_documents_equal_separate_ones(make, ids) -> None:
    model, lengths = make(), [5, 1, 7]
    parts = [ids(1, n, seed=n) for n in lengths]
    packed = torch.cat([*parts, torch.zeros(1, 3, dtype=torch.long)], 1)
    documents = torch.tensor([[1] * 5 + [2] + [3] * 7 + [0] * 3])
    logits = model(packed, document_ids=documents).logits
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        torch.testing.assert_close(logits[:, start:stop], model(part).logits, **CLOSE)
        start = stop
    # Not packed by accident: without the ids the documents do see each other.
    assert (model(packed).logits[:, 5:13] - logits[:, 5:13]).abs().max() > 1e-2


@torch.no_grad()
def test_a_packed_row_goes_on_over_a_cache(make, ids) -> None:
    model, x = make(), ids(1, 9)
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 3]])
    expected = model(x, document_ids=documents).logits
    first = model(x[:, :5], document_ids=documents[:, :5], use_cache=True)
    second = model(x[:, 5:], document_ids=documents, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(SequenceError, match=r"document_ids has 1 columns, expected 10"):
        model(x[:, :1], document_ids=documents[:, :1], past_key_values=cache)


def test_positions_follow_what_is_passed(make, ids) -> None:
    model, x = make(), ids(1, 6)
    given = torch.arange(6)[None] + 40
    moved = model(x, position_ids=given).logits
    torch.testing.assert_close(moved, model(x).logits, rtol=1e-4, atol=1e-4)  # offsets decide
    stretched = model(x, position_ids=given * 2).logits
    assert (stretched - moved).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool, make, ids) -> None:
    def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.train()
        x = ids(2, 9)
        model(x, labels=x, document_ids=torch.tensor([[1] * 4 + [2] * 5] * 2)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(make())
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(make, ids) -> None:
    model, x = make(), ids(2, 7)
    full = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, full[:, -2:], **CLOSE)
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(model(x, logits_to_keep=kept).logits, full[:, kept], **CLOSE)


@torch.no_grad()
def test_the_input_is_either_ids_or_embeddings(make, ids) -> None:
    model, x = make(), ids(1, 5)
    embeds = model.model.embed_tokens(x)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(x).logits)
    with pytest.raises(SequenceError, match="got both"):
        model(x, inputs_embeds=embeds)
    with pytest.raises(SequenceError, match="got neither"):
        model()
