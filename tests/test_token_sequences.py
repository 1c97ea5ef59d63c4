"""Proves the discrete track with the toy codec, interleaved and delayed: what is trained on is what
is generated, all of it legal, and decoding obeys grammar, lengths and settings on every path.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

import xoron_core
from tests.distributions import toy_installed
from tests.lively import enliven, ids_of
from xoron_core.errors import ConfigError, PluginError, SequenceError
from xoron_core.events import MediaOut, TokenInfo
from xoron_core.grammar import Grammar
from xoron_core.media import write_codes
from xoron_core.pieces import CodedPiece, TextPiece
from xoron_core.sampling import Choice, Sampling, text_rows
from xoron_core.session import Session

LIMITS = (1, 6)
TALKS = [
    [{"role": "user", "content": content}]
    for content in ("a wave", "hi", [{"type": "signal", "signal": torch.ones(9).numpy()}])
]


def compose(delay):
    return xoron_core.compose(
        {
            "signal": {"codec": {"use": "signal-codec", "delay": delay}},
            "tokenizer": {"use": "byte"},
            "backbone": {
                "use": "xoron-moe",
                "preset": "tiny",
                "num_layers": 2,
                "tie_word_embeddings": False,
            },
            "tokens": {"groups": ["control", "conversation"]},
        }
    )


@pytest.fixture(scope="module", params=[0, 1, 3])
def coded(request):
    """Model, processor, session and grammar of sequences, by how far codebook 1 lags behind."""
    with toy_installed():
        model, processor = compose(request.param)
        enliven(model)
        yield model, processor, Session(model, processor), processor.span_grammar()


def said(session, talks, **options):
    """Per row: all ids, and all media."""
    ids, media = {}, {}
    for event in session.stream(talks, details=True, **options):
        if isinstance(event, TokenInfo):
            ids.setdefault(event.row, []).append(event.id)
        elif isinstance(event, MediaOut):
            media.setdefault(event.row, []).append(event.media)
    return [(torch.tensor(ids[row]), media.get(row, [])) for row in sorted(ids)]


def test_a_thousand_samples_from_random_logits_are_legal_parse_and_decode(coded, monkeypatch):
    model, _, session, grammar = coded
    generator = torch.Generator().manual_seed(0)
    begin = model.space.id_of("<|gen_signal|>")

    def noise(hidden):
        logits = torch.randn(*hidden.shape[:-1], model.space.size, generator=generator)
        logits[..., begin] += 4.0  # so that many rows open several spans
        return logits * 2

    monkeypatch.setattr(type(model.backbone), "logits", lambda self, hidden: noise(hidden))
    lengths: Counter[int] = Counter()
    for seed in range(4):
        rows = said(
            session,
            [[{"role": "user", "content": "x"}]] * 250,
            makes=["signal"],
            max_new_tokens=12,
            sampling=Sampling(temperature=1.0, seed=seed),
        )
        assert len(rows) == 250
        for ids, media in rows:
            pieces = grammar.parse(ids)
            coded_pieces = [piece for piece in pieces if isinstance(piece, CodedPiece)]
            assert len(coded_pieces) == len(media)
            for piece, medium in zip(coded_pieces, media, strict=True):
                assert piece.made
                lengths[len(piece.codes)] += 1
                decoded = model.call("signal.codec", "decode", piece.codes[None], [{}])
                assert torch.equal(decoded, medium)
                assert medium.isfinite().all()
    assert set(lengths) == set(range(LIMITS[0], LIMITS[1] + 1))
    assert lengths.total() > 500


@torch.no_grad()
def test_with_cache_every_id_is_the_best_allowed_one_of_a_pass_without(coded):
    model, processor, session, _ = coded
    for talk in TALKS:
        ((ids, media),) = said(session, [talk], begin_with="signal", max_new_tokens=30)
        assert media
        batch = processor(talk)
        prompt, _ = write_codes(model, batch.get("media") or {}, batch["input_ids"])
        logits = model(input_ids=torch.cat([prompt[0], ids])[None], use_cache=False).logits[0]
        grammar = Grammar(model, processor.modalities, ["signal"])
        state = grammar.begin("signal")
        for row, token in zip(logits[prompt.shape[1] - 1 :], ids.tolist(), strict=False):
            allowed = grammar.allowed(state)
            assert int(row.masked_fill(~allowed, -torch.inf).argmax()) == token
            if token in session._ends():
                break
            state = grammar.advance(state, token)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=2.0, seed=4),
        Sampling(repetition_penalty=1.2, modalities={"signal": Choice(temperature=9.0)}, seed=3),
        Sampling(temperature=3.0, modalities={"signal": Choice(top_k=2, temperature=4.0)}, seed=2),
    ],
    ids=["greedy", "sampled", "media-sampled", "both"],
)
def test_rows_in_different_states_say_what_they_say_alone(coded, sampling):
    _, _, session, _ = coded
    options = {"makes": ["signal"], "max_new_tokens": 40, "sampling": sampling}
    together = said(session, TALKS, **options)
    for talk, (ids, media) in zip(TALKS, together, strict=True):
        ((alone, alone_media),) = said(session, [talk], **options)
        assert torch.equal(ids, alone)
        assert all(torch.equal(a, b) for a, b in zip(media, alone_media, strict=True))


@pytest.mark.parametrize("frames", range(LIMITS[0], LIMITS[1] + 1))
def test_a_request_fixes_the_length_of_a_medium_exactly(coded, frames):
    _, _, session, grammar = coded
    options = {"begin_with": "signal", "max_new_tokens": 20, "frames": {"signal": frames}}
    for sampling in (Sampling(), Sampling(temperature=5.0, seed=frames)):
        for ids, media in said(session, TALKS, sampling=sampling, **options):
            found = [piece for piece in grammar.parse(ids) if isinstance(piece, CodedPiece)]
            assert {len(piece.codes) for piece in found} == {frames}
            assert {medium.shape[-1] for medium in media} == {4 * frames}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frames": {"signal": 7}}, ConfigError, "makes 1 to 6 frames, got 7"),
        ({"frames": {"signal": 0}}, ConfigError, "makes 1 to 6 frames, got 0"),
        ({"frames": {"image": 2}}, ConfigError, "'image', but this request makes signal"),
        ({"sampling": Sampling(modalities={"sound": Choice()})}, ConfigError, "modalities: signal"),
    ],
)
def test_what_cannot_be_had_is_refused(coded, options, error, message):
    _, _, session, _ = coded
    with pytest.raises(error, match=message):
        session.stream(TALKS[0], makes=["signal"], **options)


def test_a_codec_that_needs_metadata_makes_nothing(coded, monkeypatch):
    model, _, session, _ = coded
    codec = type(model.part("signal.codec"))
    monkeypatch.setattr(codec, "needs_metadata", classmethod(lambda cls, config: True))
    with pytest.raises(PluginError, match=r"signal\.codec reads signal but cannot make it"):
        session.stream(TALKS[0], makes=["signal"])
    assert session.generate(TALKS[2], max_new_tokens=2)[0].tokens  # reading goes on


def test_each_modality_has_its_own_settings(coded):
    _, _, session, grammar = coded

    def sample(seed, **settings):
        media = Choice(**settings.pop("media"))
        sampling = Sampling(seed=seed, modalities={"signal": media}, **settings)
        ((ids, _),) = said(
            session, TALKS[:1], begin_with="signal", max_new_tokens=30, sampling=sampling
        )
        first, *rest = grammar.parse(ids)
        text = rest[0].ids if rest and isinstance(rest[0], TextPiece) else ()
        return first.codes.tolist(), text

    greedy_media = [sample(seed, temperature=5.0, media={}) for seed in range(6)]
    assert len({str(codes) for codes, _ in greedy_media}) == 1
    assert len({str(text) for _, text in greedy_media}) == 6
    sampled = [sample(seed, media={"temperature": 9.0}) for seed in range(6)]
    assert len({str(codes) for codes, _ in sampled}) > 3
    # Text stays greedy: after the same medium comes the same text.
    after = {}
    for seed in range(20):
        codes, text = sample(seed, media={"temperature": 1.0, "top_p": 0.5})
        assert after.setdefault(str(codes), text) == text
    assert 1 < len(after) < 20


@torch.no_grad()
def test_text_alone_is_the_backbones_own_greedy_text(coded):
    """Against transformers' `generate` of the bare text model, rows that are no text suppressed."""
    model, processor, session, _ = coded
    prompt = "def f(x):"
    ids = ids_of(model, processor, prompt)
    config = GenerationConfig(
        max_new_tokens=40,
        do_sample=False,
        suppress_tokens=(~text_rows(model.space)).nonzero().flatten().tolist(),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    bare = model.backbone.model.generate(ids, generation_config=config)[0, ids.shape[1] :]
    ((ours, media),) = said(session, prompt, max_new_tokens=40)
    assert ours.tolist() == bare.tolist()
    assert not media


def wave(k, n=16):
    return torch.sin(torch.arange(n) * 0.3 * (k + 1)).numpy()


def turn(role, *content):
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else
        {"type": "signal", "signal": wave(part, 8 + 4 * part)}
        for part in content
    ]  # fmt: skip
    return {"role": role, "content": parts}


@pytest.mark.parametrize(
    ("talk", "learned"),
    [
        ([turn("user", "hi"), turn("assistant", "ok")], 3),
        ([turn("user", 0, "what?"), turn("assistant", "ok")], 3),
        ([turn("user", "a wave"), turn("assistant", 1)], 6 + 2 + 1),
        (
            [
                turn("user", "one ", 0, " and ", 1),
                turn("assistant", "so ", 2, "!"),
                turn("user", 1, 1),
                turn("assistant", 0, 3),
            ],
            (3 + 8 + 2 + 1 + 1) + (4 + 2 + 10 + 2 + 1),
        ),
    ],
    ids=["text-text", "signal-text", "text-signal", "interleaved"],
)
def test_a_conversation_holds_its_codes_and_labels_what_the_assistant_says(coded, talk, learned):
    """Learned are the assistants' texts, codes, the markers around these, and the end marker."""
    model, processor, _, grammar = coded
    batch = processor(talk, train=True)
    media = batch.get("media") or {}
    ids, labels = write_codes(model, media, batch["input_ids"], batch["labels"])
    pieces = grammar.parse(ids[0])
    found = [piece for piece in pieces if isinstance(piece, CodedPiece)]
    if media:
        given = {k: v for k, v in media["signal.codec"].items() if k != "spans"}
        codes = model.call("signal.codec", "encode", **given)
        expected = [row[mask] for row, mask in zip(codes.ids, codes.mask, strict=True)]
        assert all(torch.equal(p.codes, row) for p, row in zip(found, expected, strict=True))
    assert torch.equal(grammar.build(pieces), ids[0])
    newline = processor.encode_text("\n")[0]
    counted = labels[0][(labels[0] != -100) & (labels[0] != newline)]
    assert len(counted) == learned
    markers = [model.space.id_of(f"<|{m}gen_signal|>") for m in ("", "/")]
    made = sum(piece.made for piece in found)
    assert [int((counted == marker).sum()) for marker in markers] == [made, made]
    inside = [model.space.id_of(f"<|{m}signal|>") for m in ("", "/")]
    assert not torch.isin(counted, torch.tensor(inside)).any()


def test_what_is_made_is_no_longer_than_the_codec_says(coded):
    grammar = coded[3]
    for frames, made in ((6, True), (7, False)):
        piece = CodedPiece("xoron-toy/signal-codec", torch.zeros(frames, 2).long(), made)
        assert grammar.parse(grammar.build([piece])) == [piece]
    with pytest.raises(SequenceError, match="has 1 to 6 frames, got 7"):
        grammar.build([CodedPiece("xoron-toy/signal-codec", torch.zeros(7, 2).long(), True)])


def test_the_pattern_is_part_of_what_ids_mean(coded):
    model = coded[0]
    delay = model.composition.slots["signal.codec"].config["delay"]
    with toy_installed():
        other, _ = compose((delay + 1) % 2)
    assert other.space.hash != model.space.hash
    assert other.space.size == model.space.size
