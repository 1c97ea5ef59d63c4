"""Proves the chat template: plain text renders as the published documents show, every feature
renders as documented, the assistant mask covers exactly what an assistant says, and what it cannot
render it refuses with a reason.
"""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from xoron_core.errors import SequenceError
from xoron_core.tokens.special_tokens import SPECIAL_TOKENS
from xoron_core.tokens.template import apply_chat_template_to_tokenizer, chat_template, render

MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)}
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
USER = {"role": "user", "content": "Hi"}


def rendered(tokenizer, messages, **template) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **template)


def test_the_published_example(chat):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello!"},
    ]
    assert rendered(chat, messages, add_generation_prompt=True) == (
        "<|system|>\nYou are a helpful assistant.\n<|/system|>\n"
        "<|user|>\nHello!\n<|/user|>\n"
        "<|assistant|>\n"
    )


@given(st.lists(MESSAGE, min_size=1, max_size=4), st.booleans())
def test_plain_text_renders_as_the_published_template(chat, golden_template, messages, prompt):
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=golden_template, add_generation_prompt=prompt
    )
    assert rendered(chat, messages, add_generation_prompt=prompt) == texts[0]


@given(st.lists(MESSAGE, min_size=1, max_size=3))
def test_a_list_of_text_parts_is_the_text(chat, messages):
    parts = copy.deepcopy(messages)
    for message in parts:
        text = message["content"]
        message["content"] = [
            {"type": "text", "text": text[:3]},
            {"type": "text", "text": text[3:]},
        ]
    assert rendered(chat, parts) == rendered(chat, messages)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("image", "image"),
        ("video", "video"),
        ("audio", "audio"),
        ("ecg-lead", "ecg-lead"),
        ("image_url", "image"),
        ("input_audio", "audio"),
    ],
)
def test_media_stand_where_they_are_said(chat, kind, written):
    part = {"type": kind, kind: "file"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, part, "b"]},
        {"role": "assistant", "content": [part]},
        {"role": "tool", "content": [part]},
    ]
    span = f"<|{written}|><|{written}_pad|><|/{written}|>"
    made = f"<|gen_{written}|><|{written}_pad|><|/gen_{written}|>"
    assert rendered(chat, messages) == (
        f"<|user|>\na{span}b\n<|/user|>\n"
        f"<|assistant|>\n{made}\n<|/assistant|>\n"
        f"<|tool_result|>\n{span}\n<|/tool_result|>\n"
    )


def test_the_markers_of_our_media_are_special_tokens():
    strings = set(SPECIAL_TOKENS.values())
    for kind in ("image", "video", "audio"):
        wanted = [f"<|{kind}|>", f"<|/{kind}|>", f"<|{kind}_pad|>", f"<|gen_{kind}|>"]
        assert {*wanted, f"<|/gen_{kind}|>"} <= strings


def test_reasoning(chat):
    messages = [USER, {"role": "assistant", "content": "4", "reasoning_content": "2+2"}]
    assert rendered(chat, messages).endswith(
        "<|assistant|>\n<|think|>\n2+2\n<|/think|>\n4\n<|/assistant|>\n"
    )
    plain = rendered(chat, [USER], add_generation_prompt=True)
    on = rendered(chat, [USER], add_generation_prompt=True, enable_thinking=True)
    off = rendered(chat, [USER], add_generation_prompt=True, enable_thinking=False)
    assert plain.endswith("<|assistant|>\n")
    assert on == plain + "<|think|>\n"
    assert off == plain + "<|think|>\n\n<|/think|>\n"
    # What a prompt opens is how training renders it, so the prompt is a prefix.
    assert rendered(chat, messages).startswith(on)
    empty = [USER, {"role": "assistant", "content": "4", "reasoning_content": ""}]
    assert rendered(chat, empty).startswith(off)


def test_tools(chat):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": {"city": 'Köln "Süd"'}}
    text_call = {"function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call, text_call]},
        {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    schema = json.dumps(TOOLS[0]["function"]["parameters"], ensure_ascii=False)
    listed = (
        "<|available_tools|>\n<|tool_def|><|tool_name|>weather<|/tool_name|>"
        "<|tool_desc|>Tells the weather.<|/tool_desc|>"
        f"<|tool_params|>{schema}<|/tool_params|><|/tool_def|>\n<|/available_tools|>\n"
    )
    text = rendered(chat, messages, tools=TOOLS)
    assert text == (
        f"<|system|>\n{listed}<|/system|>\n"
        "<|user|>\nHi\n<|/user|>\n"
        "<|assistant|>\n"
        "<|tool_call|><|tool_id|>c1<|/tool_id|><|function_name|>weather<|/function_name|>"
        '<|function_args|>{"city": "Köln \\"Süd\\""}<|/function_args|><|/tool_call|>\n'
        "<|tool_call|><|function_name|>weather<|/function_name|>"
        '<|function_args|>{"city":"Bonn"}<|/function_args|><|/tool_call|>\n'
        "<|/assistant|>\n"
        "<|tool_result|><|tool_id|>c1<|/tool_id|><|tool_name|>weather<|/tool_name|>\nrain\n"
        "<|/tool_result|>\n"
        "<|assistant|>\nIt rains.\n<|/assistant|>\n"
    )
    system = {"role": "system", "content": "Be brief."}
    assert rendered(chat, [system, *messages], tools=TOOLS) == text.replace(
        listed, f"Be brief.\n{listed}"
    )


def test_a_trigger_opens_an_output_span(chat):
    text = rendered(chat, [USER], add_generation_prompt=True, generate="image")
    assert text.endswith("<|assistant|>\n<|gen_image|>")


ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.text(alphabet="ab \n猫", max_size=8)},
    optional={
        "reasoning_content": st.text(alphabet="ab \n", max_size=5),
        "tool_calls": st.just([{"function": {"name": "f", "arguments": {"x": 1}}}]),
    },
)


@given(st.lists(MESSAGE.filter(lambda m: m["role"] != "assistant") | ASSISTANT, min_size=1))
@settings(max_examples=60, deadline=None)
def test_the_mask_covers_what_assistants_say_and_their_end_marker(chat, full_space, messages):
    """Cut independently at the turn markers, the masked ids are the same."""
    encoded = chat.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = encoded["input_ids"]
    begin, end = full_space.id_of("assistant_start"), full_space.id_of("assistant_end")
    expected, inside = [], False
    for position, number in enumerate(ids):
        if number == begin:
            inside, skip = True, position + 1  # the newline behind the opening marker
            expected.append(0)
        else:
            expected.append(int(inside and position != skip))
            inside = inside and number != end
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    if not any(text.startswith("\n") or text.startswith(" ") for text in said):
        assert encoded["assistant_masks"] == expected
    masked = [i for i, m in zip(ids, encoded["assistant_masks"], strict=True) if m]
    assert masked.count(end) == len(said)
    assert begin not in masked


def test_text_only_refuses_media(byte_base):
    tokenizer = apply_chat_template_to_tokenizer(copy.copy(byte_base), multimodal=False)
    assert rendered(tokenizer, [USER]) == "<|user|>\nHi\n<|/user|>\n"
    with pytest.raises(SequenceError, match=r"type image in a text-only.*multimodal=True"):
        render(tokenizer, [{"role": "user", "content": [{"type": "image", "image": "x"}]}])
    assert chat_template(multimodal=False).endswith(chat_template(multimodal=True))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "bot", "content": "x"}], "system, user, assistant or tool, got bot"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": {"type": "text"}}], "string or a list"),
        ([{"role": "user", "content": [{"text": "x"}]}], "needs a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a string under text"),
        ([{"role": "user", "content": [{"type": "x|><|user"}]}], "needs a type"),
    ],
)
def test_what_cannot_be_rendered_is_refused(chat, messages, reason):
    with pytest.raises(SequenceError, match=reason):
        render(chat, messages)


def test_without_a_template_the_fix_is_named(byte_base):
    with pytest.raises(SequenceError, match="apply_chat_template_to_tokenizer"):
        render(byte_base, [USER])
