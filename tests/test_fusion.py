"""Proves the cross-attention fusion: exactly the identity at initialisation, and afterwards a way
for text to read media that stand before it, which no path of training or generation loses.

The toy plug-in's signals stand for media of any kind. `blind` hides media positions from
self-attention, so that whatever text knows of a signal came through the fusion.
"""

import itertools
from pathlib import Path

import pytest
import torch

import xoron_core
from tests.distributions import toy_installed
from xoron_core.prefix import PrefixCache
from xoron_core.sampling import Sampling
from xoron_core.session import Session

TOY = Path(__file__).parent / "toy"
SIGNAL = {"encoder": {"use": "signal-encoder"}, "projector": {"use": "signal-projector"}}
BACKBONE = {"use": "xoron-moe", "preset": "tiny", "num_layers": 3, "tie_word_embeddings": False}
FUSION = {"use": "cross-attention", "num_layers": 2, "num_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module", autouse=True)
def toy():
    """The toy distribution, discovered on the path as an installed one is."""
    with toy_installed():
        yield


def composition(fusion=FUSION, backbone=BACKBONE, **more):
    return {
        "signal": SIGNAL,
        "tokenizer": {"use": "byte"},
        "backbone": backbone,
        "tokens": {"groups": ["control", "conversation"]},
        **({"fusion": fusion} if fusion else {}),
        **more,
    }


def enliven(model, fusion=True):
    """Large random weights: what is said depends on all that was said, and on media."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fusion" in name and not fusion:
                continue
            if parameter.ndim >= 2 and "router" not in name:
                parameter.normal_(0, 0.16, generator=generator)


@pytest.fixture(scope="module")
def fused():
    """A model whose fusion has learned something, and its processor."""
    model, processor = xoron_core.compose(composition())
    enliven(model)
    return model, processor


def wave(k, n=16):
    return torch.sin(torch.arange(n) * 0.3 * (k + 1)).numpy()


def signal(k, n=16):
    return {"type": "signal", "signal": wave(k, n)}


def user(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def blind(batch):
    """The batch with media positions hidden from self-attention."""
    mask = batch["attention_mask"].clone()
    for row, start, length in batch["media"]["signal.encoder"]["spans"].tolist():
        mask[row, start : start + length] = 0
    return {**batch, "attention_mask": mask}


CLOSE = {"rtol": 1e-5, "atol": 3e-5}  # of logits up to 9
TALKS = [
    [user("what? ", signal(0))],
    [user("no signal here, only words")],
    [user(signal(1, n=24), " or ", signal(2), "?")],
]


def test_at_initialisation_logits_losses_and_text_are_those_without_it_bit_for_bit():
    with_it, processor = xoron_core.compose(composition())
    without, _ = xoron_core.compose(composition(fusion=None))
    for model in (with_it, without):
        enliven(model, fusion=False)
    batch = processor(TALKS)
    with torch.no_grad():
        ours, theirs = with_it(**batch).logits, without(**batch).logits
    assert torch.equal(ours, theirs)
    talk = [*TALKS[0], {"role": "assistant", "content": "yes"}]
    losses = [m.train()(**processor(talk, train=True)).loss for m in (with_it, without)]
    assert torch.equal(*losses)
    for model in (with_it, without):
        model.eval()
    replies = [
        Session(model, processor).generate(TALKS, max_new_tokens=12, details=True)
        for model in (with_it, without)
    ]
    assert replies[0] == replies[1]
    out = [m.generate(**batch, max_new_tokens=12, do_sample=False) for m in (with_it, without)]
    assert torch.equal(*out)


@torch.no_grad()
def test_text_behind_a_signal_reads_it_and_text_before_it_does_not(fused):
    model, processor = fused
    batches = [blind(processor([user("before ", signal(k), " behind")])) for k in (0, 1)]
    first, second = (model(**batch).logits[0] for batch in batches)
    _, start, length = batches[0]["media"]["signal.encoder"]["spans"][0].tolist()
    assert torch.equal(first[:start], second[:start])
    assert (first - second).abs().amax(-1)[start + length :].min() > 0.01
    kept = [block.o_proj.weight.clone() for block in model.fusion.adapters]
    for block in model.fusion.adapters:
        block.o_proj.weight.zero_()
    first, second = (model(**batch).logits[0] for batch in batches)
    for block, weight in zip(model.fusion.adapters, kept, strict=True):
        block.o_proj.weight.copy_(weight)
    assert torch.equal(first[start + length :], second[start + length :]), "no other way"


@torch.no_grad()
@pytest.mark.parametrize("hide", [True, False])
def test_cached_steps_equal_one_pass_also_where_media_come_later(fused, hide):
    """A turn at a time and then id by id; the second signal joins a memory that holds the first."""
    model, processor = fused
    batch = processor([user("one ", signal(0), " two ", signal(1), " three")])
    batch = blind(batch) if hide else batch
    whole = model(**batch).logits
    ids, mask = batch["input_ids"], batch["attention_mask"]
    entry = batch["media"]["signal.encoder"]
    (_, first, _), (_, second, length) = entry["spans"].tolist()
    cuts = [0, first + 5, *range(second, ids.shape[1] + 1)]
    del cuts[3 : 3 + length - 1]  # a medium comes whole
    cache, pieces = None, []
    for begin, end in itertools.pairwise(cuts):
        inside = (entry["spans"][:, 1] >= begin) & (entry["spans"][:, 1] < end)
        media = {name: tensor[inside] for name, tensor in entry.items()}
        media["spans"] = media["spans"] - torch.tensor([0, begin, 0])
        output = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache,
            use_cache=True, media={"signal.encoder": media} if bool(inside.any()) else None,
        )  # fmt: skip
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


@torch.no_grad()
def test_a_cropped_cache_forgets_the_media_behind_its_end(fused):
    model, processor = fused
    batch = blind(processor([user("x", signal(0), "ab", signal(1), "cd")]))
    output = model(**batch, use_cache=True)
    start = int(batch["media"]["signal.encoder"]["spans"][1, 1])
    output.past_key_values.crop(start - batch["input_ids"].shape[1])
    more = processor.encode_text("something else that is longer than what was there")
    ids = torch.cat([batch["input_ids"][:, :start], torch.tensor([more])], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :start] = batch["attention_mask"][:, :start]
    cache, steps = output.past_key_values, []
    for end in range(start + 1, ids.shape[1] + 1):  # several steps: forgotten once for all
        step = model(
            input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache
        )
        steps.append(step.logits)
    entry = {name: tensor[:1] for name, tensor in batch["media"]["signal.encoder"].items()}
    whole = model(input_ids=ids, attention_mask=mask, media={"signal.encoder": entry}).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, start:], **CLOSE)


@torch.no_grad()
def test_a_left_padded_batch_equals_single_rows(fused):
    model, processor = fused
    batch = processor(TALKS)
    together = model(**batch).logits
    for row, talk in enumerate(TALKS):
        alone = model(**processor(talk)).logits[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)


@torch.no_grad()
def test_packed_documents_read_their_own_media_only(fused):
    model, processor = fused
    singles = [processor(talk) for talk in TALKS]
    lengths = [batch["input_ids"].shape[1] for batch in singles]
    documents = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(lengths))[None]
    packed, spans, offset = {}, [], 0
    for batch, length in zip(singles, lengths, strict=True):
        for _, start, size in batch.get("media", {}).get("signal.encoder", {}).get("spans", []):
            spans.append([0, offset + int(start), int(size)])
        offset += length
    packed = processor(TALKS)["media"]["signal.encoder"] | {"spans": torch.tensor(spans)}
    logits = model(
        input_ids=torch.cat([batch["input_ids"] for batch in singles], 1),
        document_ids=documents,
        media={"signal.encoder": packed},
    ).logits[0]
    for batch, piece in zip(singles, logits.split(lengths), strict=True):
        torch.testing.assert_close(piece, model(**batch).logits[0], **CLOSE)


@pytest.mark.parametrize(
    "options", [{"cache": "static"}, {"window": 200}, {"cache": "static", "window": 200},
                {"draft": True}, {"prefix": True}]
)  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_every_cache_says_the_same_for_every_row(fused, options, sampling):
    model, processor = fused
    options = dict(options)
    if options.get("draft"):
        options["draft"] = model
        if sampling.temperature:
            pytest.skip("draws are spent differently with a draft")
    prefix = PrefixCache() if options.pop("prefix", None) else None
    alone = [
        Session(model, processor).generate(talk, max_new_tokens=16, sampling=sampling)[0].text
        for talk in TALKS
    ]
    session = Session(model, processor, **options)
    for _ in range(2):
        got = session.generate(TALKS, max_new_tokens=16, sampling=sampling, prefix=prefix)
        assert [reply.text for reply in got] == alone
    assert len(set(alone)) == 3


def test_session_and_generate_agree_with_and_without_a_cache(fused):
    model, processor = fused
    batch = processor(TALKS)
    session = Session(model, processor)
    expected = [r.text for r in session.generate(TALKS, max_new_tokens=16)]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        for _ in range(2):  # a static cache is used again, and must have forgotten
            out = model.generate(**batch, max_new_tokens=16, do_sample=False, **options)
            said = [processor.decode(row[batch["input_ids"].shape[1] :]) for row in out]
            assert said == expected, options


@torch.no_grad()
def test_beams_and_samples_of_a_row_read_the_media_of_that_row(fused):
    """Each beam's score, made with a reordered cache, against one pass over it without any."""
    model, processor = fused
    batch = processor(TALKS)
    prompt, steps, beams = batch["input_ids"].shape[1], 8, 3
    out = model.generate(
        **batch, max_new_tokens=steps, num_beams=beams, num_return_sequences=beams,
        do_sample=False, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    pad = processor.tokenizer.pad_token_id
    for index, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores)):  # noqa: B905
        row = index // beams
        ids = sequence[None, : prompt + int((sequence[prompt:] != pad).sum())]
        mask = torch.ones_like(ids)
        mask[:, :prompt] = batch["attention_mask"][row]
        entry = batch["media"]["signal.encoder"]
        own = entry["spans"][:, 0] == row
        media = {name: tensor[own] for name, tensor in entry.items()}
        media["spans"] = media["spans"] * torch.tensor([0, 1, 1])
        whole = model(
            input_ids=ids, attention_mask=mask, use_cache=False,
            media={"signal.encoder": media} if bool(own.any()) else None,
        ).logits[0, prompt - 1 : -1]  # fmt: skip
        each = whole.log_softmax(-1).gather(1, ids[0, prompt:, None])
        assert float(score) == pytest.approx(float(each.sum()), abs=2e-3)


def test_a_conversation_keeps_its_media_between_turns(fused):
    """With a prefix cache a turn runs only what is new, and still reads the first turn's signal."""
    model, processor = fused
    session, prefix, talk = Session(model, processor), PrefixCache(), []
    for turn in (user("listen: ", signal(0)), user("and?"), user(signal(3), "now"), user("why")):
        talk.append(turn)
        reply = session.generate(talk, max_new_tokens=10, prefix=prefix)[0]
        assert reply.text == session.generate(talk, max_new_tokens=10)[0].text
        assert reply.usage.reused > 0 or len(talk) == 1
        talk.append({"role": "assistant", "content": reply.text})
    other = [user("listen: ", signal(1)), *talk[1:-1]]
    assert session.generate(other, max_new_tokens=10, prefix=prefix)[0].text == (
        session.generate(other, max_new_tokens=10)[0].text
    )


@torch.no_grad()
def test_a_step_over_a_static_cache_is_one_graph(fused):
    from transformers import StaticCache

    from xoron_core.caches import decode_step

    model, processor = fused
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(decode_step, fullgraph=True, dynamic=False, backend=backend)
    for talk in (TALKS[0], TALKS[2]):
        batch = processor(talk)
        length = batch["input_ids"].shape[1]
        more = torch.tensor([processor.encode_text("yes it is")])
        ids = torch.cat([batch["input_ids"], more], dim=1)
        cache = StaticCache(config=model.config, max_cache_len=64)
        seen = (torch.arange(64) <= torch.arange(length)[:, None])[None, None]
        model(**{**batch, "attention_mask": seen}, past_key_values=cache, use_cache=True)
        for position in range(length, ids.shape[1]):
            got = step(
                model, model.backbone.embed(ids[:, position : position + 1]),
                mask=(torch.arange(64) <= position).view(1, 1, 1, 64),
                positions=torch.tensor([[position]]), cache=cache,
            ).logits  # fmt: skip
            whole = model(input_ids=ids[:, : position + 1], media=batch["media"]).logits
            torch.testing.assert_close(got, whole[:, -1:], **CLOSE)
    assert len(graphs) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_every_parameter(recompute):
    """And are the same where activations are recomputed: the fusion stands outside of that."""
    model, processor = xoron_core.compose(composition())
    enliven(model)
    batch = processor([[*talk, {"role": "assistant", "content": "yes"}] for talk in TALKS],
                      train=True)  # fmt: skip
    model.train()
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    missing = [name for name, p in model.fusion.named_parameters() if not p.grad.any()]
    assert not missing
    if recompute:
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            if name in found:
                torch.testing.assert_close(p.grad, found[name], **CLOSE)


def counted(model, request):
    calls = []
    handle = model.fusion.register_forward_hook(lambda *_: calls.append(1))
    request.addfinalizer(handle.remove)
    return calls


def test_it_never_runs_on_text_alone(fused, request):
    model, processor = fused
    calls = counted(model, request)
    text = [user("only words")]
    Session(model, processor).generate(text, max_new_tokens=5)
    model.generate(**processor(text), max_new_tokens=5, num_beams=2)
    model(**processor([*text, {"role": "assistant", "content": "yes"}], train=True))
    assert not calls
    Session(model, processor).generate(TALKS[0], max_new_tokens=5)
    assert len(calls) == 5 * len(model.fusion.layers), "every pass reads the signal"


def test_training_on_text_alone_gives_it_zero_gradients_unless_it_is_frozen(request):
    model, processor = xoron_core.compose(composition())
    enliven(model)
    calls = counted(model, request)
    batch = processor([user("only words"), {"role": "assistant", "content": "yes"}], train=True)
    model.eval()
    expected = model(**batch).losses["text"].sum
    model.train()
    output = model(**batch)
    output.loss.backward()
    assert torch.equal(output.losses["text"].sum, expected)
    assert len(calls) == len(model.fusion.layers), "as often as with media"
    grads = [parameter.grad for parameter in model.fusion.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    model.fusion.requires_grad_(False)
    calls.clear()
    model(**batch)
    assert not calls


def test_it_is_planned_saved_and_loaded_like_any_slot(fused, tmp_path):
    model, processor = fused
    xoron_core.save(model, processor, tmp_path / "m")
    assert (tmp_path / "m/slots/fusion-00001.safetensors").is_file()
    loaded, again = xoron_core.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(**again(TALKS)).logits, model(**processor(TALKS)).logits)
    part = xoron_core.load_slot(tmp_path / "m", "fusion")
    assert part.layers == model.fusion.layers == (0, 2)
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, model.fusion.state_dict()[name])
