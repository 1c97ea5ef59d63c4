"""Proves the generated tokenizer: every id of the space survives saving and reopening without
remote code, with holes and with specials above a codec range; text and markup stay apart.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import SequenceError, TokenSpaceError
from xoron_core.tokens.space import CodecRange, TokenSpace
from xoron_core.tokens.special_tokens import core_groups
from xoron_core.tokens.tokenizer import (
    build_tokenizer,
    control_tokens,
    encode_markup,
    encode_text,
    text_base,
)

CORE = {group.name.partition("/")[2]: group for group in core_groups()}
MUST = [CORE["control"], CORE["conversation"]]
CODEC = CodecRange("toy/codec", 0, 50, "codes", 25.0, "signal")
ODD = TokenGroup("ecg/leads", {"lead": "<|lead|>", "odd": 'a "b\\ c'})


def space_over(base, groups, codecs=(), lock=None, base_specials="keep") -> TokenSpace:
    text = text_base(base, name="test/base", base_specials=base_specials)
    return TokenSpace.allocate(text=text, groups=groups, codecs=codecs, lock=lock)


def reopened(tokenizer, **config) -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if config:
            (Path(folder) / "config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)


def check_ids(space, base, tokenizer) -> None:
    """Every id of the space, and nothing else, is in the tokenizer."""
    vocab = tokenizer.get_vocab()
    own = {
        string: number for string, number in base.get_vocab().items() if number < space.text_size
    }
    assert vocab == {**own, **space.special_ids}
    for string, number in space.special_ids.items():
        assert tokenizer.convert_tokens_to_ids(string) == number
        assert encode_markup(tokenizer, f"a{string}b").count(number) == 1
        assert tokenizer.decode([number]) == string
        assert tokenizer.backend_tokenizer.get_added_tokens_decoder()[number].content == string
    live = set(vocab.values())
    for number in set(range(space.size)) - live:
        assert tokenizer.convert_ids_to_tokens(number) is None
        assert tokenizer.decode([number]) == ""


@given(
    st.lists(st.sampled_from([*CORE.values(), ODD]), max_size=4, unique_by=lambda g: g.name),
    st.booleans(),
    st.lists(st.sampled_from([*CORE.values(), ODD]), max_size=4, unique_by=lambda g: g.name),
)
@settings(max_examples=15, deadline=None)
def test_reopening_keeps_every_id_with_holes_and_specials_above_codecs(base, first, codec, second):
    """The first allocation's groups become holes unless they stay; the second's lie above."""
    kept = {g.name for g in MUST}
    first = [*MUST, *(g for g in first if g.name not in kept)]
    second = [*MUST, *(g for g in second if g.name not in kept)]
    lock = space_over(base, first, [CODEC])
    space = space_over(base, second, [CODEC] if codec else [], lock)
    tokenizer = build_tokenizer(space, base)
    again = reopened(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    check_ids(space, base, again)
    for name in ("bos", "eos", "pad"):
        assert getattr(again, f"{name}_token_id") == space.id_of(name)


def test_the_cases_that_matter_are_reached(base):
    """A hole in the middle, a special above a codec range, and both after reopening twice."""
    lock = space_over(base, [*MUST, CORE["fim"], CORE["multimodal"]], [CODEC])
    space = space_over(base, [*MUST, CORE["multimodal"], ODD], [CODEC], lock)
    assert any(s.removed for s in space.specials)
    assert space.id_of("lead") >= space.range("toy/codec:0").stop
    check_ids(space, base, reopened(reopened(build_tokenizer(space, base))))


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gpt2", "bert"])
def test_a_config_beside_it_changes_nothing(bpe_base, model_type):
    """AutoTokenizer must not pick another class by the model's type."""
    space = space_over(bpe_base, MUST, [CODEC])
    tokenizer = build_tokenizer(space, bpe_base)
    again = reopened(tokenizer, model_type=model_type)
    check_ids(space, bpe_base, again)
    assert again("The cat<|user|>")["input_ids"] == tokenizer("The cat<|user|>")["input_ids"]


def test_base_text_keeps_its_ids_and_nothing_is_added(base):
    space = space_over(base, list(CORE.values()))
    tokenizer = build_tokenizer(space, base)
    for text in ("The cat sat on the mat.", "naïve 猫 \U0001f600", "", "  \n\n\t"):
        ids = tokenizer(text)["input_ids"]
        assert ids == base(text, add_special_tokens=False)["input_ids"]
        assert encode_text(tokenizer, text) == encode_markup(tokenizer, text) == ids


def test_the_bases_specials_are_aliased_kept_or_dropped(bpe_base):
    kept = space_over(bpe_base, [*MUST, CORE["fim"]])
    own = bpe_base.get_vocab()
    assert kept.text_size == len(own)
    assert kept.id_of("fim_prefix") == own["<|fim_prefix|>"]
    tokenizer = reopened(build_tokenizer(kept, bpe_base))
    assert encode_markup(tokenizer, "<|im_start|>") == [own["<|im_start|>"]]
    dropped = space_over(bpe_base, [*MUST, CORE["fim"]], base_specials="drop")
    assert dropped.text_size == min(own[token] for token in bpe_base.get_added_vocab())
    assert dropped.id_of("fim_prefix") >= dropped.text_size
    tokenizer = reopened(build_tokenizer(dropped, bpe_base))
    check_ids(dropped, bpe_base, tokenizer)
    assert "<|im_start|>" not in tokenizer.get_vocab()
    assert kept.text.identity != dropped.text.identity


def test_control_of_the_base(bpe_base):
    space = space_over(bpe_base, [])
    base = build_tokenizer(space, bpe_base, control="base")
    base.chat_template = "x"
    tokenizer = reopened(build_tokenizer(space, base, control="base"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.bos_token is None
    assert tokenizer.chat_template == "x"
    with pytest.raises(TokenSpaceError, match=r"'bos'.*tokens.groups.*xoron-core/control"):
        build_tokenizer(space, bpe_base)
    dropped = space_over(bpe_base, MUST, base_specials="drop")
    with pytest.raises(TokenSpaceError, match="keep the base's specials"):
        build_tokenizer(dropped, bpe_base, control="base")


def test_a_base_that_does_not_fit_is_refused(byte_base, bpe_base):
    space = space_over(byte_base, MUST)
    with pytest.raises(TokenSpaceError, match=r"at 256, but the text base.*has 256 ids"):
        build_tokenizer(space, bpe_base)
    text = text_base(bpe_base, name="test/base")
    forgotten = TokenSpace.allocate(
        text=type(text)(text.name, text.size, text.identity), groups=[*MUST, CORE["fim"]]
    )
    with pytest.raises(TokenSpaceError, match="must own the strings"):
        build_tokenizer(forgotten, bpe_base)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(TokenSpaceError, match="WordLevel model; expected BPE"):
        text_base(words, name="test/base")
    with pytest.raises(TokenSpaceError, match="no text base"):
        build_tokenizer(TokenSpace.allocate(text=None, groups=[], codecs=[CODEC]), byte_base)


PIECES = st.sampled_from(
    ["<|user|>", "<|/user|>", "<|im_end|>", "[e~[", "[d~[", "<|...|>", "<|", "|>", "é", " ", "a"]
)
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join)


@given(TEXT)
@settings(max_examples=80, deadline=None)
def test_look_alikes_in_text_stay_text(chat, full_space, text):
    """No added token's id comes out, and the text comes back whole."""
    ids = encode_text(chat, text)
    assert not set(ids) & set(chat.added_tokens_decoder)
    assert chat.decode(ids) == text
    assert all(number < full_space.text_size for number in ids)


@given(TEXT, TEXT)
@settings(max_examples=40, deadline=None)
def test_a_bases_plain_added_token_is_control_if_its_template_writes_it(bpe_base, before, after):
    space = space_over(bpe_base, [])
    (call,) = bpe_base.convert_tokens_to_ids(["<tool_call>"])
    text = f"{before}<tool_call>{after}<tool_call>"
    free = build_tokenizer(space, bpe_base, control="base", chat_template="{{ messages }}")
    assert encode_text(free, text).count(call) == 2
    assert "<tool_call>" not in control_tokens(free)
    free.chat_template = "<tool_call>{{ messages }}"
    ids = encode_text(free, text)
    assert not set(ids) & set(free.added_tokens_decoder)
    assert free.decode(ids) == text


@given(st.lists(st.sampled_from(["<|user|>", "<|/user|>", "<|...|>", "hello", " "]), max_size=6))
def test_markup_is_parsed_on_purpose(chat, full_space, words):
    expected = []
    for word in words:
        known = full_space.special_ids.get(word)
        expected.append([known] if known is not None else None)
    ids = encode_markup(chat, "".join(words))
    assert [i for i in ids if i in full_space.special_ids.values()] == [e[0] for e in expected if e]
    assert chat.decode(ids) == "".join(words)


def test_look_alikes_stay_text_where_the_model_looks_up_whole_words():
    """`ignore_merges` (Llama 3) would find our string in the model vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    base = PreTrainedTokenizerFast(tokenizer_object=backend)
    space = space_over(base, [*MUST, CORE["special"]])
    tokenizer = reopened(build_tokenizer(space, base))
    text = "<|...|>a <|...|>\n<|...|>"
    fast = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert space.id_of("ellipsis") in fast  # the trap is real
    ids = encode_text(tokenizer, text)
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_text_that_is_no_unicode_is_refused(chat):
    for encode in (encode_text, encode_markup):
        with pytest.raises(SequenceError, match=r"lone surrogate .* position 2"):
            encode(chat, "ab\ud800")
