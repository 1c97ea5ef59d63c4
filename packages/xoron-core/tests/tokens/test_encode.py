"""Proves chat encoding: clean conversations encode as transformers does it, and nothing written
inside messages, tools or arguments ever becomes a special token.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.errors import SequenceError
from xoron_core.tokens.encode import encode_chat
from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.special_tokens import core_groups, select
from xoron_core.tokens.template import apply_chat_template_to_tokenizer
from xoron_core.tokens.tokenizer import build_tokenizer, text_base

CLEAN = st.text(alphabet='ab {}"\\\n猫é.', max_size=10)
WHOLE = ["<|user|>", "<|/assistant|>", "<|image_pad|>", "<|im_end|>", "<|no_such|>", "[e~[d~["]
BROKEN = ["<|us", "er|>", "<", "|>", "[e~", "[", "]~b]"]
OTHER = ["\U00013000", "a", " ", "\n", '"', "\\", "猫"]
EVIL = st.lists(st.sampled_from([*WHOLE, *BROKEN, *OTHER]), max_size=6).map("".join)


def conversation(text):
    """Messages with every place that text can stand in."""
    user = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": text})
    parts = st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": text})
        | st.fixed_dictionaries({"type": st.just("image"), "image": text}),
        max_size=4,
    )
    listed = st.fixed_dictionaries({"role": st.just("user"), "content": parts})
    call = st.fixed_dictionaries(
        {
            "function": st.fixed_dictionaries(
                {"name": text, "arguments": st.dictionaries(text, text, max_size=2) | text}
            )
        }
    )
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": text},
        optional={"reasoning_content": text, "tool_calls": st.lists(call, max_size=2)},
    )
    tool = st.fixed_dictionaries({"role": st.just("tool"), "content": text, "name": text})
    return st.lists(user | listed | assistant | tool, min_size=1, max_size=4)


def tools(text):
    function = st.fixed_dictionaries(
        {"name": text, "description": text, "parameters": st.dictionaries(text, text, max_size=2)}
    )
    return st.none() | st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "function": function}), max_size=2
    )


def emptied(data):
    """The same structure, without a character of what people wrote that could matter."""
    if isinstance(data, str):
        return "x" if data else ""
    if isinstance(data, dict):
        keep = ("role", "type")
        known = ("content", "text", "image", "name", "function", "arguments", "tool_calls")
        known += ("reasoning_content", "description", "parameters", *keep)
        return {
            (k if k in known else f"k{i}"): (v if k in keep else emptied(v))
            for i, (k, v) in enumerate(data.items())
        }
    return [emptied(entry) for entry in data] if isinstance(data, list) else data


@given(conversation(CLEAN), tools(CLEAN), st.booleans())
@settings(max_examples=60, deadline=None)
def test_clean_conversations_encode_as_in_transformers(chat, full_space, messages, listed, prompt):
    ours = encode_chat(
        chat,
        full_space,
        messages,
        tools=listed,
        add_generation_prompt=prompt,
        return_assistant_mask=True,
    )
    theirs = chat.apply_chat_template(
        messages,
        tools=listed,
        add_generation_prompt=prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ours.input_ids == theirs["input_ids"]
    assert ours.assistant_mask == [bool(flag) for flag in theirs["assistant_masks"]]
    text = chat.apply_chat_template(
        messages, tools=listed, add_generation_prompt=prompt, tokenize=False
    )
    assert ours.text == text


@given(conversation(EVIL), tools(EVIL))
@settings(max_examples=120, deadline=None)
def test_what_is_written_in_content_never_becomes_special(chat, full_space, messages, listed):
    """The special ids are those of the same conversation with harmless content, and the decoded
    ids are exactly what transformers renders."""
    got = encode_chat(chat, full_space, messages, tools=listed, return_assistant_mask=True)
    harmless = encode_chat(chat, full_space, emptied(messages), tools=emptied(listed))
    special = {number for number, token in chat.added_tokens_decoder.items() if token.special}
    assert [i for i in got.input_ids if i in special] == [
        i for i in harmless.input_ids if i in special
    ]
    text = chat.apply_chat_template(messages, tools=listed, tokenize=False)
    assert got.text == text
    assert chat.decode(got.input_ids) == text
    assert len(got.assistant_mask) == len(got.input_ids)


def test_a_line_break_inside_a_look_alike_stays_text(chat, full_space):
    """JSON writes it as two letters, so that the rendered text looks like a special token."""
    listed = [{"type": "function", "function": {"name": "f", "parameters": {"<|us\ner|>": {}}}}]
    got = encode_chat(chat, full_space, [{"role": "user", "content": "x"}], tools=listed)
    assert r"<|us\ner|>" in chat.decode(got.input_ids)


@given(EVIL)
@settings(max_examples=60, deadline=None)
def test_the_mask_is_right_with_look_alikes(chat, full_space, evil):
    messages = [
        {"role": "user", "content": evil},
        {"role": "assistant", "content": f"x{evil}"},
        {"role": "user", "content": evil},
    ]
    got = encode_chat(chat, full_space, messages, return_assistant_mask=True)
    said = [i for i, flag in zip(got.input_ids, got.assistant_mask, strict=True) if flag]
    assert chat.decode(said) == f"x{evil}\n<|/assistant|>"


def test_a_look_alike_spread_over_two_parts_stays_text(chat, full_space):
    parts = [{"type": "text", "text": piece} for piece in ("<|us", "er|>", "[", "e~[")]
    got = encode_chat(chat, full_space, [{"role": "user", "content": parts}])
    counts = Counter(got.input_ids)
    assert counts[full_space.id_of("user_start")] == 1
    assert counts[full_space.id_of("encoder_start")] == 0
    naive = chat.apply_chat_template([{"role": "user", "content": parts}])["input_ids"]
    assert Counter(naive)[full_space.id_of("user_start")] == 2  # the trap is real


def test_markup_in_content_is_parsed_only_on_purpose(chat, full_space):
    messages = [{"role": "user", "content": "<|code|>x<|/code|>"}]
    code = full_space.id_of("code_start")
    assert code not in encode_chat(chat, full_space, messages).input_ids
    assert code in encode_chat(chat, full_space, messages, parse_markup=True).input_ids


def test_messages_are_not_changed(chat, full_space):
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|user|>"}]}]
    before = copy.deepcopy(messages)
    encode_chat(chat, full_space, messages)
    assert messages == before


def small(base, names) -> tuple:
    groups = select(names, core_groups())
    space = TokenSpace.allocate(text=text_base(base, name="test/base"), groups=groups)
    return apply_chat_template_to_tokenizer(build_tokenizer(space, base)), space


@pytest.mark.parametrize(
    ("messages", "template", "group"),
    [
        ([{"role": "assistant", "content": "a", "reasoning_content": "b"}], {}, "reasoning"),
        ([{"role": "user", "content": "a"}], {"tools": [{"name": "f"}]}, "tools"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "multimodal"),
        (
            [{"role": "user", "content": "a"}],
            {"add_generation_prompt": True, "enable_thinking": False},
            "reasoning",
        ),
    ],
)
def test_a_token_that_the_space_lacks_names_its_group(base, messages, template, group):
    tokenizer, space = small(base, ["control", "conversation"])
    with pytest.raises(SequenceError, match=f"tokens.groups.*xoron-core/{group}"):
        encode_chat(tokenizer, space, messages, **template)
    # The same strings in content are just text.
    plain = [{"role": "user", "content": "<|think|> <|image_pad|> <|ecg|>"}]
    assert max(encode_chat(tokenizer, space, plain).input_ids) <= space.id_of("user_end")


def test_a_third_partys_medium_names_its_strings(base):
    tokenizer, space = small(base, ["control", "conversation"])
    messages = [{"role": "user", "content": [{"type": "ecg"}]}]
    with pytest.raises(SequenceError, match=r"<\|ecg\|>, <\|ecg_pad\|>, <\|/ecg\|>.*plug-in"):
        encode_chat(tokenizer, space, messages)


BASE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_base_template_without_generation_blocks_gets_a_mask(bpe_base):
    """What an assistant message adds behind its generation prompt, by difference of prefixes."""
    space = TokenSpace.allocate(text=text_base(bpe_base, name="test/base"), groups=[])
    tokenizer = build_tokenizer(space, bpe_base, control="base", chat_template=BASE_TEMPLATE)
    messages = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "one<|im_end|>"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "two"},
    ]
    got = encode_chat(tokenizer, space, messages, return_assistant_mask=True)
    said = [i for i, flag in zip(got.input_ids, got.assistant_mask, strict=True) if flag]
    assert tokenizer.decode(said) == "one<|im_end|><|im_end|>\ntwo<|im_end|>\n"
    assert Counter(got.input_ids)[space.text.owned["<|im_end|>"]] == 4
    tokenizer.chat_template = "{{ '<tool_call>' }}" + BASE_TEMPLATE
    evil = [{"role": "user", "content": "<tool_call>"}]
    call = space.text.owned["<tool_call>"]
    assert encode_chat(tokenizer, space, evil).input_ids.count(call) == 1
    tokenizer.chat_template = "{{ messages | length }}" + BASE_TEMPLATE
    with pytest.raises(SequenceError, match="renders earlier turns differently"):
        encode_chat(tokenizer, space, messages, return_assistant_mask=True)
