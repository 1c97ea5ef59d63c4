"""Proves the stream decoder: pieces joined equal the whole decode, and no piece is half a
character, for any text cut into any bytes and for any sequence of ids.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from xoron_core.tokens.stream import StreamDecoder
from xoron_core.tokens.tokenizer import encode_text


def streamed(tokenizer, ids, **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*(decoder.push(number) for number in ids), decoder.flush()]


@given(st.text(max_size=30))
@settings(deadline=None)
def test_text_comes_back_in_whole_characters(chat, text):
    pieces = streamed(chat, encode_text(chat, text))
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_ids_stream_as_they_decode(chat, full_space, data):
    """Invalid bytes, special tokens between the bytes of a character, ids without text."""
    ids = data.draw(st.lists(st.integers(0, full_space.size + 5), max_size=25))
    skip = data.draw(st.booleans())
    whole = chat.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(chat, ids, skip_special_tokens=skip)) == whole


def test_a_character_is_held_back_until_it_is_whole(chat, byte_base):
    ids = byte_base("猫")["input_ids"]
    assert len(ids) == 3
    assert streamed(byte_base, ids) == ["", "", "猫", ""]
    assert streamed(byte_base, ids[:2]) == ["", "", "\ufffd"]
    assert streamed(byte_base, [*ids[:1], *byte_base("a")["input_ids"]]) == ["", "\ufffda", ""]


def test_a_decoder_serves_again_after_flush(byte_base):
    decoder = StreamDecoder(byte_base)
    first, *_ = byte_base("猫")["input_ids"]
    assert decoder.push(first) + decoder.flush() == "\ufffd"
    (plain,) = byte_base("a")["input_ids"]
    assert decoder.push(plain) + decoder.flush() == "a"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A BPE with `▁` for space and byte fallback, as Llama 2 has."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁", "a", "b", "▁a", "é"]:
        vocab[piece] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token=None)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@given(st.text(alphabet="ab é猫\U0001f600\n", max_size=15))
@settings(deadline=None)
def test_other_tokenizers_stream_text_as_they_decode_it(text):
    tokenizer = sentencepiece_like()
    ids = tokenizer(text)["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
