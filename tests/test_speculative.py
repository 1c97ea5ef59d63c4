"""Proves speculative decoding: greedy text is the model's own for any draft, sampled text has the
model's own distribution, and the draft pays: fewer passes of the model."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lively import lively
from xoron_core.errors import ConfigError, TokenSpaceError
from xoron_core.events import Finished
from xoron_core.prefix import PrefixCache
from xoron_core.sampling import Sampling
from xoron_core.session import Session
from xoron_core.speculative import accept_row

WORDS = ("a", "a longer question, really", "ok?", "x = [")
TALKS = [[{"role": "user", "content": text}] for text in WORDS]


@pytest.fixture(scope="module")
def target():
    return lively()


@pytest.fixture(scope="module")
def plain(target):
    return Session(*target)


@torch.no_grad()
def near(model, noise, seed):
    """The model with noise on its weights: a draft that is right sometimes."""
    draft, _ = lively()
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return draft


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    noise=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    seed=st.integers(0, 5),
    count=st.integers(1, 6),
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    limit=st.integers(1, 30),
    penalty=st.sampled_from([1.0, 1.4]),
)
def test_greedy_text_is_identical_for_any_draft(
    target, plain, noise, seed, count, rows, limit, penalty
):
    model, processor = target
    draft = near(model, noise, seed)
    options = {"max_new_tokens": limit, "sampling": Sampling(repetition_penalty=penalty)}
    talks = [TALKS[row] for row in rows]
    expected = plain.generate(talks, details=True, **options)
    session = Session(model, processor, draft=draft, draft_tokens=count)
    got = session.generate(talks, details=True, **options)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.text, ours.reason, ours.tokens) == (theirs.text, theirs.reason, theirs.tokens)
        assert [i.id for i in ours.details] == [i.id for i in theirs.details]
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3)
        if noise == 0:
            assert ours.usage.accepted == ours.usage.drafted


def test_ids_that_were_not_accepted_are_not_penalised(target, plain):
    """They stay in the cache for rows whose neighbours accepted more."""
    model, processor = target
    options = {"max_new_tokens": 40, "sampling": Sampling(repetition_penalty=2.0)}
    session = Session(model, processor, draft=near(model, 0.05, 1), draft_tokens=6)
    got, expected = (s.generate(TALKS, **options) for s in (session, plain))
    assert [reply.text for reply in got] == [reply.text for reply in expected]
    assert len({reply.usage.accepted / reply.usage.drafted for reply in got}) > 1


def test_a_draft_of_another_shape_and_unrelated_weights_changes_nothing(target, plain):
    model, processor = target
    draft, _ = lively("backbone.num_layers=1", "backbone.use_moe=false", seed=77)
    session = Session(model, processor, draft=draft)
    expected = plain.generate(TALKS, max_new_tokens=40)
    got = session.generate(TALKS, max_new_tokens=40)
    assert [reply.text for reply in got] == [reply.text for reply in expected]
    assert len({reply.text for reply in expected}) == len(TALKS)
    assert all(reply.usage.acceptance < 0.3 for reply in got)


def test_a_good_draft_saves_passes_and_the_numbers_say_so(target, plain):
    model, processor = target
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    reply = Session(model, processor, draft=near(model, 0, 0)).generate(
        TALKS[1], max_new_tokens=40
    )[0]
    handle.remove()
    alone = plain.generate(TALKS[1], max_new_tokens=40)[0]
    assert reply.usage.steps == len(calls) < alone.usage.steps / 3
    assert reply.usage.acceptance == 1
    assert alone.usage.acceptance is None


def test_rows_that_accept_differently_stay_independent_when_sampling(target):
    model, processor = target
    session = Session(model, processor, draft=near(model, 0.05, 1))
    options = {"sampling": Sampling(temperature=1.0, seed=4), "max_new_tokens": 25}
    together = session.generate(TALKS, **options)
    alone = [session.generate(talk, **options)[0] for talk in TALKS]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    accepted = [reply.usage.accepted for reply in together]
    assert len(set(accepted)) > 1


def test_stop_strings_and_prefix_reuse_work_with_a_draft(target, plain):
    model, processor = target
    session = Session(model, processor, draft=near(model, 0.02, 2))
    whole = plain.generate(TALKS[1], max_new_tokens=40)[0].text
    stop = next(whole[i : i + 2] for i in range(12, 30) if whole.index(whole[i : i + 2]) == i)
    prefix = PrefixCache()
    for _ in range(2):
        events = list(session.stream(TALKS[1], max_new_tokens=40, stop=[stop], prefix=prefix))
        text = "".join(event.text for event in events[:-1])
        assert text == whole[: whole.index(stop)]
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "stop"
    assert prefix.reused > 10


def distribution(seed, size, sharp=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(size, generator=generator)).softmax(-1)


def test_the_accept_rule_draws_from_the_models_distribution():
    """Two drafted ids over five, conditional tables, 20,000 draws: every pair of first ids has the
    model's joint probability, within four standard errors, and the share of accepted first ids is
    the overlap of the two distributions (Leviathan et al. 2023, theorem 3.5)."""
    size, draws = 5, 20_000
    p = [distribution(0, size), [distribution(10 + i, size) for i in range(size)]]
    q = [distribution(1, size), [distribution(20 + i, size) for i in range(size)]]
    last = distribution(3, size)
    generator = torch.Generator().manual_seed(9)
    counts = torch.zeros(size, size)
    first_accepted = 0
    for _ in range(draws):
        a = int(torch.multinomial(q[0], 1, generator=generator))
        b = int(torch.multinomial(q[1][a], 1, generator=generator))
        accepted, pick = accept_row([p[0], p[1][a], last], [q[0], q[1][a]], [a, b], generator)
        said = [*[a, b][:accepted], pick]
        if len(said) == 1:  # the next round would go on from the model's own distribution
            said.append(int(torch.multinomial(p[1][said[0]], 1, generator=generator)))
        counts[said[0], said[1]] += 1
        first_accepted += accepted > 0
    for a, b in itertools.product(range(size), repeat=2):
        expected = float(p[0][a] * p[1][a][b])
        error = (expected * (1 - expected) / draws) ** 0.5
        assert float(counts[a, b]) / draws == pytest.approx(expected, abs=4 * error + 1e-4)
    overlap = float(torch.minimum(p[0], q[0]).sum())
    assert first_accepted / draws == pytest.approx(overlap, abs=4 * (0.25 / draws) ** 0.5)
    assert not torch.allclose(counts.sum(1) / draws, q[0], atol=0.05)


@torch.no_grad()
def test_sampled_answers_have_the_models_distribution(target):
    """Through the whole session with a poor draft: 400 times two ids among the four best; their
    counts pass a chi-square test against exact probabilities, made without cache or draft."""
    model, processor = target
    session = Session(model, processor, draft=near(model, 0.1, 3), draft_tokens=2)
    sampling = Sampling(temperature=1.5, top_k=4)
    counts: dict[tuple[int, ...], int] = {}
    draws, drafted, accepted = 400, 0, 0
    for seed in range(draws):
        one = sampling.model_copy(update={"seed": seed})
        reply = session.generate("q", max_new_tokens=2, sampling=one, details=True)[0]
        ids = tuple(info.id for info in reply.details)
        counts[ids[:2]] = counts.get(ids[:2], 0) + 1
        drafted, accepted = drafted + reply.usage.drafted, accepted + reply.usage.accepted
    assert 0.05 < accepted / drafted < 0.9, "both ways of the rule are taken"
    exact = joint(model, processor, sampling)
    assert set(counts) <= set(exact)
    expected = {pair: p * draws for pair, p in exact.items()}
    chi2 = sum((counts.get(pair, 0) - e) ** 2 / e for pair, e in expected.items())
    freedom = len(expected) - 1
    # Wilson and Hilferty (1931): (chi2 / n) ** (1/3) is nearly normal; 3.7 is one in ten thousand.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 3.7


def joint(model, processor, sampling):
    """Exact probabilities of the first two ids, from passes without a cache."""
    from xoron_core.sampling import text_rows

    start = torch.tensor([[processor.tokenizer.bos_token_id, *processor.encode_text("q")]])

    def probabilities(ids):
        scores = model(input_ids=ids, use_cache=False).logits[:, -1]
        scores = scores.masked_fill(~text_rows(model.space), -float("inf"))
        return sampling.warpers()(ids, scores).softmax(-1)[0]

    found = {}
    first = probabilities(start)
    ends = model.generation_config.eos_token_id
    for a in first.nonzero().flatten().tolist():
        if a in ends:
            found[(a,)] = float(first[a])
            continue
        second = probabilities(torch.cat([start, torch.tensor([[a]])], dim=1))
        for b in second.nonzero().flatten().tolist():
            found[a, b] = float(first[a] * second[b])
    return found


def test_a_draft_that_does_not_fit_is_refused(target):
    model, processor = target
    other, _ = lively("tokens.groups=[control,conversation]")
    with pytest.raises(TokenSpaceError, match="the draft model"):
        Session(model, processor, draft=other)
    with pytest.raises(ConfigError, match="draft_tokens 0"):
        Session(model, processor, draft=model, draft_tokens=0)
    for options in ({"cache": "static"}, {"window": 8}):
        with pytest.raises(ConfigError, match="a draft model needs cache='dynamic'"):
            Session(model, processor, draft=model, **options)
    with pytest.raises(ConfigError, match="text only"):
        Session(model, processor, draft=model).stream("x", makes=["image"])
