"""Proves the runtime for text: cache, padding, masks, sampling and beams are equal on every path,
and what is said of a token is true."""

import pytest
import torch
from transformers import GenerationConfig

import xoron_core
from tests.lively import ids_of
from xoron_core.errors import ConfigError
from xoron_core.events import Finished, TextDelta, TokenInfo
from xoron_core.sampling import Sampling, text_rows
from xoron_core.session import Session


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
    assert not torch.allclose(model(input_ids=ids).logits[0, 4:], first, atol=0.1)


@torch.no_grad()
def test_token_details_are_of_the_models_own_distribution(loud):
    """Against one pass without cache over prompt and answer, masked to what text allows."""
    model, processor, session = loud
    prompt = "while True:"
    ids = ids_of(model, processor, prompt)
    sampling = Sampling(temperature=1.7, top_k=20, repetition_penalty=1.3, seed=8)
    reply = session.generate(prompt, max_new_tokens=25, sampling=sampling, details=True)[0]
    said = torch.tensor([info.id for info in reply.details])
    logits = model(input_ids=torch.cat([ids[0], said])[None], use_cache=False).logits
    logits = logits[0, ids.shape[1] - 1 : -1].masked_fill(~text_rows(model.space), -float("inf"))
    expected = torch.distributions.Categorical(logits=logits)
    for name, values in (("logprob", expected.log_prob(said)), ("entropy", _entropy(logits))):
        got = torch.tensor([getattr(info, name) for info in reply.details])
        torch.testing.assert_close(got, values, rtol=1e-3, atol=1e-3)
    assert reply.confidence == pytest.approx(float(expected.log_prob(said).mean().exp()), rel=1e-3)
    assert session.generate(prompt, max_new_tokens=3)[0].confidence is None


def _entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


def test_reasoning_is_hidden_or_marked_and_counts_for_no_confidence():
    """Ids are forced through a stand-in head: reasoning, opened by the model or by the prompt."""
    options = ["backbone.num_layers=2", "tokens.groups=[control,conversation,reasoning]"]
    model, processor = xoron_core.compose(preset="tiny", overrides=options)
    session = Session(model, processor)
    begin, end = (model.space.id_of(s) for s in ("<|think|>", "<|/think|>"))
    stop = model.generation_config.eos_token_id[0]
    thought, answer = processor.encode_text("mmm stop "), processor.encode_text("yes")

    def say(script, **options):
        script = iter(script)

        def head(hidden):
            logits = torch.zeros(*hidden.shape[:-1], model.space.size)
            logits[..., next(script)] = 5.0
            return logits

        model.backbone.logits = head
        talk = [{"role": "user", "content": "?"}]
        return list(session.stream(talk, stop=["stop"], details=True, **options))

    for script, template in (
        ([begin, *thought, end, *answer, stop], {}),
        ([*thought, end, *answer, stop], {"enable_thinking": True}),
    ):
        hidden = say(script, **template)
        shown = say(script, show_hidden=True, **template)
        for events in (hidden, shown):
            pieces = [event for event in events if isinstance(event, TextDelta)]
            assert "".join(p.text for p in pieces if not p.hidden) == "yes"
            counted = [e.id for e in events if isinstance(e, TokenInfo) and e.answer]
            assert counted == [*answer, stop]
            assert events[-1].reason == "stop"
        assert not any(e.hidden for e in hidden if isinstance(e, TextDelta))
        thoughts = [e.text for e in shown if isinstance(e, TextDelta) and e.hidden]
        assert "".join(thoughts) == "mmm stop "


def test_session_and_generate_agree_on_greedy_text(loud):
    model, processor, session = loud
    prompt = "class Point:\n"
    ids = ids_of(model, processor, prompt)
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    expected = processor.decode(out[0, ids.shape[1] :])
    assert session.generate(prompt, max_new_tokens=40)[0].text == expected
    assert torch.equal(model.generate_text(input_ids=ids, max_new_tokens=40, do_sample=False), out)
    assert len(expected) > 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(repetition_penalty=0.7),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=2.5, seed=2),
        Sampling(temperature=2.0, top_k=7, seed=3),
        Sampling(temperature=2.0, top_k=1, seed=3),
        Sampling(temperature=2.0, top_p=0.7, seed=4),
        Sampling(temperature=3.0, min_p=0.1, seed=5),
        Sampling(temperature=1.0, min_p=1.0, seed=5),
        Sampling(
            temperature=2.0, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=6
        ),
    ],
)  # fmt: skip
def test_session_and_generate_agree_for_every_setting_under_a_seed(loud, sampling):
    """The draws are the same because one row takes one number per id from equal streams."""
    model, processor, session = loud
    prompt = "for x in range(10):\n"
    ids = ids_of(model, processor, prompt)
    warp = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p or None}  # fmt: skip
    torch.manual_seed(sampling.seed or 0)
    out = model.generate(
        ids, max_new_tokens=40, repetition_penalty=sampling.repetition_penalty,
        do_sample=sampling.temperature > 0, **(warp if sampling.temperature else {}),
    )  # fmt: skip
    infos = session.generate(prompt, max_new_tokens=40, sampling=sampling, details=True)[0].details
    assert [info.id for info in infos] == out[0, ids.shape[1] :].tolist()


def test_penalty_ignores_padding_and_neighbours(loud):
    """Rows of different length, one of which would be penalised for its padding."""
    _, _, session = loud
    talks = [[{"role": "user", "content": text}] for text in ("a", "some much longer question")]
    sampling = Sampling(repetition_penalty=1.8)
    together = session.generate(talks, sampling=sampling, max_new_tokens=30)
    alone = [session.generate([talk], sampling=sampling, max_new_tokens=30)[0] for talk in talks]
    assert [r.text for r in together] == [r.text for r in alone]
    assert together[0].text != session.generate([talks[0]], max_new_tokens=30)[0].text


@torch.no_grad()
def test_a_top_choice_that_text_does_not_allow_leaves_something_to_sample(loud):
    """The mask comes before top-k: else nothing would be left."""
    model, processor, _ = loud
    ids = ids_of(model, processor, "x")
    banned = int((~text_rows(model.space)).nonzero()[0])
    weight = model.get_output_embeddings().weight
    kept = weight[banned].clone()
    try:
        weight[banned] = 50 * model(input_ids=ids).hidden[0, -1]
        assert int(model(input_ids=ids).logits[0, -1].argmax()) == banned
        out = model.generate(ids, max_new_tokens=1, do_sample=True, top_k=1)
    finally:
        weight[banned] = kept
    assert bool(text_rows(model.space)[out[0, -1]])


@torch.no_grad()
def test_beam_scores_are_the_log_probabilities_of_what_was_said(loud):
    """Each beam's score, made with the reordered cache, against one pass without any."""
    model, processor, _ = loud
    ids = ids_of(model, processor, "def f(")
    steps, beams = 12, 4
    out = model.generate(
        ids, max_new_tokens=steps, num_beams=beams, num_return_sequences=beams, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    pad = processor.tokenizer.pad_token_id
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        said = sequence[ids.shape[1] :]
        said = said[said != pad]
        whole = torch.cat([ids[0], said])[None]
        logprobs = model(input_ids=whole, use_cache=False).logits.log_softmax(-1)
        each = logprobs[0, ids.shape[1] - 1 : -1].gather(1, said[:, None])
        assert float(score) == pytest.approx(float(each.sum()), abs=1e-3)
    assert len({tuple(s.tolist()) for s in out.sequences}) == beams


@torch.no_grad()
def test_enough_beams_find_the_best_pair_of_ids(loud):
    """Two steps with a beam for every id are an exhaustive search, done here without beams."""
    model, processor, _ = loud
    ids = ids_of(model, processor, "a")
    allowed = text_rows(model.space)
    for end in model.generation_config.eos_token_id:
        allowed[end] = False
    options = allowed.nonzero().flatten()
    first = model(input_ids=ids).logits[0, -1].log_softmax(-1)[options]
    pairs = torch.cat([ids.expand(len(options), -1), options[:, None]], dim=1)
    second = model(input_ids=pairs).logits[:, -1].log_softmax(-1)[:, options]
    best = int((first[:, None] + second).argmax())
    expected = [int(options[best // len(options)]), int(options[best % len(options)])]
    out = model.generate(
        ids, max_new_tokens=2, num_beams=len(options), do_sample=False,
        suppress_tokens=model.generation_config.eos_token_id,
    )  # fmt: skip
    assert out[0, ids.shape[1] :].tolist() == expected


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


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -2},
        {"min_p": -0.1}, {"min_p": 1.5}, {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
)  # fmt: skip
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
