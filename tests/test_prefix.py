"""Proves prefix reuse: the text is that of a run from scratch, and exactly the positions that agree
are not run again; counted in the model's own forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xoron_core
from xoron_core.errors import ConfigError
from xoron_core.events import TokenInfo
from xoron_core.prefix import PrefixCache
from xoron_core.sampling import Sampling
from xoron_core.session import Session

TOY = Path(__file__).parent / "toy"
SYSTEM = {"role": "system", "content": "You are brief, kind and right."}
LIVELY = {"num_layers": 2, "tie_word_embeddings": False}


def enliven(model):
    """Large random weights: what is said depends on all that was said."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "router" not in name:
                parameter.mul_(0.16 / parameter.std())


@pytest.fixture(scope="module")
def pair():
    model, processor = xoron_core.compose(
        preset="tiny", overrides=[f"backbone.{k}={str(v).lower()}" for k, v in LIVELY.items()]
    )
    enliven(model)
    return model, processor


@pytest.fixture
def count(pair, request):
    """Positions that really went through the backbone, over all rows."""
    return counting(pair[0], request)


def counting(model, request):
    ran = []
    handle = model.backbone.register_forward_pre_hook(
        lambda _, arguments: ran.append(arguments[0].shape[0] * arguments[0].shape[1])
    )
    request.addfinalizer(handle.remove)
    return ran


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_runs_only_what_is_new_and_says_the_same(pair, count):
    session = Session(*pair)
    prefix = PrefixCache()
    talk = [SYSTEM]
    for turn in ("hello", "and then?", "why", "é ok"):
        talk.append(user(turn))
        ids = pair[1](talk)["input_ids"][0].tolist()
        pairs = list(zip(ids[:-1], prefix._keys, strict=False))
        agree = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        before = len(count)
        reply = session.generate(talk, max_new_tokens=12, prefix=prefix)[0]
        ran = count[before:]
        assert ran[0] == len(ids) - agree
        assert sum(ran) == reply.usage.positions
        assert reply.usage.reused == agree
        again = session.generate(talk, max_new_tokens=12)[0]
        assert again.text == reply.text
        assert again.usage.positions == reply.usage.positions + agree
        talk.append({"role": "assistant", "content": reply.text})
    assert prefix.reused > 3 * len(pair[1]([SYSTEM])["input_ids"][0])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "ab", "abc", "b", "a b", "zz"]), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    sampled=st.booleans(),
)
def test_any_series_of_requests_says_what_each_says_alone(pair, texts, sampled):
    """Batches and single conversations in any order over one prefix cache."""
    session = Session(*pair)
    prefix = PrefixCache()
    sampling = Sampling(temperature=1.0, seed=1, repetition_penalty=1.1) if sampled else Sampling()
    for batch in texts:
        talks = [[SYSTEM, user(text)] for text in batch]
        expected = session.generate(talks, max_new_tokens=8, sampling=sampling)
        got = session.generate(talks, max_new_tokens=8, sampling=sampling, prefix=prefix)
        assert [reply.text for reply in got] == [reply.text for reply in expected]


def test_a_batch_runs_its_shared_prefix_once(pair, count):
    session = Session(*pair)
    processor = pair[1]
    talks = [[SYSTEM, user(text)] for text in ("one", "another, longer one", "x", "yes?")]
    prefix = PrefixCache()
    expected = session.generate(talks, max_new_tokens=10)
    plain = expected[0].usage.positions
    count.clear()
    got = session.generate(talks, max_new_tokens=10, prefix=prefix)
    assert [reply.text for reply in got] == [reply.text for reply in expected]
    rows = [processor(talk)["input_ids"][0].tolist() for talk in talks]
    shared = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    assert len(prefix) == shared
    assert count[0] == shared
    assert count[1] == 4 * (max(map(len, rows)) - shared)
    longest = max(reply.usage.positions for reply in got)
    assert longest == sum(count) == plain - 3 * shared
    count.clear()
    session.generate(talks, max_new_tokens=1, prefix=prefix)
    assert count == [4 * (max(map(len, rows)) - shared)]


def test_a_reader_who_stops_early_leaves_a_whole_cache(pair):
    session = Session(*pair)
    talk = [SYSTEM, user("go")]
    prefix = PrefixCache()
    events = session.stream(talk, max_new_tokens=30, details=True, prefix=prefix)
    said = []
    for event in events:
        if isinstance(event, TokenInfo):
            said.append(event.id)
        if len(said) == 10:
            break
    events.close()
    prompt = pair[1](talk)["input_ids"][0].tolist()
    assert prefix._keys == [*prompt, *said[:9]]
    whole = session.generate(talk, max_new_tokens=30)[0]
    again = session.generate(talk, max_new_tokens=30, prefix=prefix)[0]
    assert again.text == whole.text
    assert again.usage.reused == len(prompt) - 1


def test_a_pass_that_breaks_off_leaves_nothing_behind(pair):
    """An interrupt between two layers: the layers then hold different numbers of positions."""
    model, processor = pair
    session = Session(model, processor)
    talk = [SYSTEM, user("go")]
    prefix = PrefixCache()
    expected = session.generate(talk, max_new_tokens=6, prefix=prefix)[0].text

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.backbone.model.base_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.generate(talk, max_new_tokens=6, prefix=prefix)
    handle.remove()
    assert len(prefix) == 0
    assert session.generate(talk, max_new_tokens=6, prefix=prefix)[0].text == expected


def test_it_serves_one_model_and_growing_caches_only(pair):
    model, processor = pair
    prefix = PrefixCache()
    Session(model, processor).generate("x", max_new_tokens=2, prefix=prefix)
    other, _ = xoron_core.compose(preset="tiny", overrides=["backbone.num_layers=2"])
    with pytest.raises(ConfigError, match="another model"):
        Session(other, processor).generate("x", max_new_tokens=2, prefix=prefix)
    prefix.clear()
    Session(other, processor).generate("x", max_new_tokens=2, prefix=prefix)
    for options in ({"cache": "static"}, {"window": 9}):
        with pytest.raises(ConfigError, match="a prefix cache needs cache='dynamic'"):
            Session(model, processor, **options).stream("x", prefix=prefix)


@pytest.mark.parametrize("kind", ["encoder", "codec"])
def test_media_are_reused_only_where_they_are_the_same(toy, kind, request):
    parts = {
        "encoder": {"encoder": {"use": "signal-encoder"},
                    "projector": {"use": "signal-projector"}},
        "codec": {"codec": {"use": "signal-codec"}},
    }[kind]  # fmt: skip
    model, processor = xoron_core.compose(
        {
            "signal": parts,
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", **LIVELY},
            "tokens": {"groups": ["control", "conversation"]},
        }
    )
    enliven(model)
    count = counting(model, request)
    session = Session(model, processor)
    prefix = PrefixCache()

    def talk(first, second):
        waves = [np.sin(np.arange(24) * f, dtype=np.float32) for f in (first, second)]
        parts = [[{"type": "signal", "signal": w}, {"type": "text", "text": "?"}] for w in waves]
        return [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": "k"},
                {"role": "user", "content": parts[1]}]  # fmt: skip

    def ask(*waves):
        before = len(count)
        reply = session.generate(talk(*waves), max_new_tokens=8, prefix=prefix)[0]
        ran = count[before]
        assert session.generate(talk(*waves), max_new_tokens=8)[0].text == reply.text
        return ran, reply.text

    total, text = ask(0.3, 0.9)
    assert ask(0.3, 0.9) == (1, text)
    second, other = ask(0.3, 2.1)
    assert other != text, "the model hears the second signal"
    plan = processor.plan(talk(0.3, 0.9))
    assert total == len(processor(talk(0.3, 0.9))["input_ids"][0])
    assert second == total - plan.spans[1].start
    assert ask(1.4, 2.1)[0] == total - plan.spans[0].start
