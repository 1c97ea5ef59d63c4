"""Proves the runtime for text: cache, padding, masks and sampling are equal on every path."""

import pytest
import torch
from transformers import GenerationConfig

import xoron_core
from xoron_core.errors import ConfigError
from xoron_core.events import Finished, TextDelta
from xoron_core.sampling import Sampling, text_rows
from xoron_core.session import Session


@pytest.fixture(scope="module")
def loud():
    """A tiny model whose head is scaled up, so that random weights have clear preferences."""
    model, processor = xoron_core.compose(preset="tiny", overrides=["backbone.num_layers=2"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    return model, processor, Session(model, processor)


def ids_of(model, processor, text):
    ids = [processor.tokenizer.bos_token_id, *processor.encode_text(text)]
    return torch.tensor([ids])


@torch.no_grad()
def test_cached_decoding_equals_uncached(loud):
    model, processor, _ = loud
    ids = ids_of(model, processor, "import os\nimport sys\n")
    whole = model(input_ids=ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = model(
            input_ids=ids[:, position : position + 1],
            attention_mask=torch.ones(1, position + 1, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_left_padded_batch_equals_single_rows(loud):
    model, processor, _ = loud
    rows = [ids_of(model, processor, text) for text in ("a", "longer text here", "mid one")]
    width = max(row.shape[1] for row in rows)
    ids = torch.full((3, width), processor.tokenizer.pad_token_id)
    mask = torch.zeros(3, width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, -row.shape[1] :] = row
        mask[b, -row.shape[1] :] = 1
    batch = model(input_ids=ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        alone = model(input_ids=row).logits[0]
        torch.testing.assert_close(batch[b, -row.shape[1] :], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changing_a_masked_token_changes_nothing(loud):
    model, processor, _ = loud
    ids = ids_of(model, processor, "some text to read")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    other = ids.clone()
    other[0, :4] = 7
    first, second = (model(input_ids=i, attention_mask=mask).logits[0, 4:] for i in (ids, other))
    assert torch.equal(first, second)
    assert not torch.equal(model(input_ids=ids).logits[0, 4:], first)


def test_session_and_generate_agree_on_greedy_text(loud):
    model, processor, session = loud
    prompt = "class Point:\n"
    ids = ids_of(model, processor, prompt)
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    expected = processor.decode(out[0, ids.shape[1] :])
    assert session.generate(prompt, max_new_tokens=40)[0].text == expected
    assert torch.equal(model.generate_text(input_ids=ids, max_new_tokens=40, do_sample=False), out)
    assert len(expected) > 5


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_never_gives_a_row_that_text_does_not_allow(loud, beams):
    model, processor, _ = loud
    allowed = text_rows(model.space)
    assert 0 < int((~allowed).sum()) < 40
    ids = ids_of(model, processor, "x = ")
    torch.manual_seed(0)
    config = GenerationConfig(
        max_new_tokens=60, do_sample=beams == 1, temperature=30.0 if beams == 1 else 1.0,
        num_beams=beams, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    out = model.generate(ids.expand(4, -1) if beams == 1 else ids, generation_config=config)
    new = out[:, ids.shape[1] :]
    assert bool(allowed[new[new != processor.tokenizer.pad_token_id]].all())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=3)]
)
def test_a_batch_of_conversations_equals_each_alone(loud, sampling):
    _, _, session = loud
    talks = [
        [{"role": "user", "content": text}] for text in ("a", "a longer question, really", "ok?")
    ]
    together = session.generate(talks, sampling=sampling, max_new_tokens=20)
    for talk, reply in zip(talks, together, strict=True):
        assert session.generate([talk], sampling=sampling, max_new_tokens=20)[0].text == reply.text


def test_a_seed_repeats_and_another_differs(loud):
    _, _, session = loud

    def say(seed):
        sampling = Sampling(temperature=4.0, seed=seed)
        return session.generate("def ", sampling=sampling, max_new_tokens=30)[0].text

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(loud):
    _, _, session = loud
    whole = session.generate("class A", max_new_tokens=60)[0].text
    stop = whole[10:13]
    reply = session.generate("class A", max_new_tokens=60, stop=[stop])[0]
    assert reply.text == whole[: whole.index(stop)]
    assert reply.reason == "stop"


def test_events_are_whole_characters_and_end_once_per_row(loud):
    _, _, session = loud
    sampling = Sampling(temperature=5.0, seed=0)
    events = list(session.stream("é", sampling=sampling, max_new_tokens=80))
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
    assert all(event.text for event in events if isinstance(event, TextDelta))
    assert events[-1].tokens <= 80


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}])
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        Sampling(**options)


def test_accumulated_losses_give_the_gradient_of_the_large_batch(loud):
    model, processor, _ = loud
    model.train()
    talks = [
        [{"role": "user", "content": "q" * k}, {"role": "assistant", "content": "answer " * k}]
        for k in range(1, 5)
    ]
    batches = [processor(talk, train=True) for talk in talks]
    whole = processor(talks, train=True)
    count = model.loss_counts(whole)["text"]
    assert torch.equal(count, sum(model.loss_counts(batch)["text"] for batch in batches))

    def gradient(parts):
        model.zero_grad()
        for batch in parts:
            (model(**batch).losses["text"].sum / count).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    small, large = gradient(batches), gradient([whole])
    model.eval()
    assert float((small - large).norm() / large.norm()) < 1e-6
