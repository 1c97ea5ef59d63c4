"""Proves that every cache (growing, static, sliding, of grouped-query, latent and transformers' own
models) gives the text of the growing one, and that a step over a static cache compiles."""

import pytest
import torch
from transformers import StaticCache

import xoron_core
from tests.lively import ids_of
from xoron_core.caches import CacheOptions, Lane, decode_step
from xoron_core.errors import CompositionError, ConfigError, SequenceError
from xoron_core.prefix import PrefixCache
from xoron_core.sampling import Sampling
from xoron_core.session import Session

TALKS = [[{"role": "user", "content": t}] for t in ("a", "a longer question, really", "ok?")]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2, seed=3)]
)
@pytest.mark.parametrize(
    "options",
    [{"cache": "static"}, {"cache": "static", "max_length": 97}, {"window": 200},
     {"cache": "static", "window": 200}],
)  # fmt: skip
def test_every_cache_gives_the_text_of_the_growing_one(loud, options, sampling):
    model, processor, session = loud
    expected = session.generate(TALKS, max_new_tokens=40, sampling=sampling)
    other = Session(model, processor, **options)
    got = other.generate(TALKS, max_new_tokens=40, sampling=sampling)
    assert [reply.text for reply in got] == [reply.text for reply in expected]
    assert len({reply.text for reply in expected}) == 3


def test_latent_attention_decodes_the_same_on_every_path():
    """Its cache holds values of no width, and one query is computed another way than many."""
    options = ["backbone.num_layers=2", "backbone.attention=latent", "backbone.num_kv_heads=null"]
    model, processor = xoron_core.compose(preset="tiny", overrides=options)
    expected = Session(model, processor).generate(TALKS, max_new_tokens=20, details=True)
    for options in ({"cache": "static"}, {"window": 200}, {"draft": model}, {"prefix": True}):
        prefix = PrefixCache() if options.pop("prefix", None) else None
        session = Session(model, processor, **options)
        got = session.generate(TALKS, max_new_tokens=20, details=True, prefix=prefix)
        for ours, theirs in zip(got, expected, strict=True):
            assert [i.id for i in ours.details] == [i.id for i in theirs.details]
            assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_window_is_attention_to_the_last_positions_alone(loud, kind):
    """Cached decoding against one pass under a banded mask, with left padding; and the dynamic
    cache holds no more than it needs."""
    model, processor, _ = loud
    window, prompt = 5, 9
    ids = ids_of(model, processor, "a sliding window of a few")
    total = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    index = torch.arange(total)
    band = (index[None] <= index[:, None]) & (index[None] > index[:, None] - window)
    band = (band & (mask[0] != 0)) | torch.eye(total, dtype=torch.bool)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=band[None, None], position_ids=positions)
    lane = Lane(model, CacheOptions(kind, window=window), total)
    steps = [lane.run(mask[:, :prompt], input_ids=ids[:, :prompt]).logits]
    for end in range(prompt + 1, total + 1):
        embeds = model.backbone.embed(ids[:, end - 1 : end])
        steps.append(lane.run(mask[:, :end], inputs_embeds=embeds).logits)
    torch.testing.assert_close(
        torch.cat(steps, 1), whole.logits[:, prompt - 1 :], rtol=1e-4, atol=1e-4
    )
    plain = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(plain[:, -1], steps[-1][:, -1], atol=0.1)
    if kind == "dynamic":
        assert {layer.keys.shape[-2] for layer in lane.cache.layers} == {window - 1}


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [[], ["backbone.attention=latent", "backbone.num_kv_heads=null"]]
)
def test_a_step_with_experts_is_one_graph(options):
    """Captured without a graph break (an error here) and run as captured."""
    options = ["backbone.num_layers=2", *options]
    model, processor = xoron_core.compose(preset="tiny", overrides=options)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(decode_step, fullgraph=True, dynamic=False, backend=backend)
    ids = ids_of(model, processor, "abcdef")
    cache = StaticCache(config=model.config, max_cache_len=16)
    for position in range(ids.shape[1]):
        seen = (torch.arange(16) <= position).view(1, 1, 1, 16)
        embeds = model.backbone.embed(ids[:, position : position + 1])
        run = step if position > 2 else decode_step
        at = torch.tensor([[position]])
        got = run(model, embeds, mask=seen, positions=at, cache=cache).logits
        whole = model(input_ids=ids[:, : position + 1]).logits[:, -1:]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_step_over_a_static_cache_compiles_as_one_graph():
    """Without graph breaks (they are errors here), once for all steps, requests and lengths."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model, processor = xoron_core.compose(
        preset="tiny", overrides=["backbone.num_layers=2", "backbone.use_moe=false"]
    )
    plain = Session(model, processor)
    compiled = Session(model, processor, cache="static", max_length=80, compile=True)
    for talk in TALKS:
        expected = plain.generate(talk, max_new_tokens=10, details=True)[0]
        got = compiled.generate(talk, max_new_tokens=10, details=True)[0]
        assert [info.id for info in got.details] == [info.id for info in expected.details]
        for ours, theirs in zip(got.details, expected.details, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "statik"}, "'dynamic' or 'static'"),
        ({"max_length": 10}, "cache='static'"),
        ({"cache": "static", "max_length": 0}, "1 or more"),
        ({"window": 1}, "2 or more"),
        ({"compile": True}, "cache='static'"),
    ],
)
def test_cache_options_that_do_not_fit_are_refused(loud, options, words):
    model, processor, _ = loud
    with pytest.raises(ConfigError, match=words):
        Session(model, processor, **options)


def test_a_static_cache_that_is_too_short_says_both_numbers(loud):
    model, processor, _ = loud
    session = Session(model, processor, cache="static", max_length=30)
    needed = processor(TALKS[0])["input_ids"].shape[1] + 37
    with pytest.raises(SequenceError, match=rf"can need {needed} positions.*holds 30"):
        session.generate(TALKS[0], max_new_tokens=37)


HF = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip


def hf_pair(**config):
    return xoron_core.compose(
        {
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "hf", "hf_config": {**HF, **config}},
            "tokens": {"groups": ["control", "conversation"], "template": "xoron"},
        }
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_model_decodes_the_same_on_every_path(attention):
    model, processor = hf_pair(model_type="qwen3", attn_implementation=attention)
    assert model.backbone.model.config._attn_implementation == attention
    expected = Session(model, processor).generate(TALKS, max_new_tokens=25)
    assert len({reply.text for reply in expected}) == len(TALKS)
    for options in (
        {"cache": "static"}, {"window": 200}, {"draft": model}, {"prefix": PrefixCache()},
    ):  # fmt: skip
        prefix = options.pop("prefix", None)
        session = Session(model, processor, **options)
        got = session.generate(TALKS, max_new_tokens=25, prefix=prefix)
        assert [reply.text for reply in got] == [reply.text for reply in expected]


def test_a_model_that_slides_by_itself_is_told_what_does_not_fit():
    model, processor = hf_pair(model_type="mistral", sliding_window=6)
    session = Session(model, processor)
    expected = session.generate(TALKS, max_new_tokens=12)
    prefix = PrefixCache()
    for _ in range(2):
        got = session.generate(TALKS[0], max_new_tokens=12, prefix=prefix)
        assert got[0].text == expected[0].text
    assert prefix.reused == 0, "its cache cannot be cut, so nothing is taken over"
    for options in ({"cache": "static"}, {"window": 4}):
        with pytest.raises(CompositionError, match="sliding"):
            Session(model, processor, **options).generate(TALKS[0])
    with pytest.raises(CompositionError, match="does not keep every position"):
        Session(model, processor, draft=model).generate(TALKS[0])
