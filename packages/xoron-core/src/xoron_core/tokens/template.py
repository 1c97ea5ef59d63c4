"""The chat template: one Jinja file for Hugging Face messages, and how it is rendered.

What it renders, newlines included (`<|system|>\\n...\\n<|/system|>\\n`):
- roles system, user, assistant, tool; content as a string or a list of parts;
- a medium of type T as `<|T|><|T_pad|><|/T|>`, in an assistant's message as
  `<|gen_T|><|T_pad|><|/gen_T|>`, with one placeholder, for any T that a plug-in brings;
- `reasoning_content` as `<|think|>` block; `tools`, `tool_calls` and tool results;
- `{% generation %}` around what an assistant says up to and including its end marker.

Footguns
- `enable_thinking=True` opens the block in the prompt, so generated text begins inside it: put
  `<|think|>` in front of it before `strip_hidden_tokens`. `False` puts an empty block there.
- `tokenizer.apply_chat_template` parses markup inside message content. For what people write use
  `xoron_core.tokens.encode.encode_chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from xoron_core.errors import SequenceError

Message = Mapping[str, Any]
_T = TypeVar("_T", bound=PreTrainedTokenizerBase)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEXT_ONLY = "{%- set multimodal = false -%}\n"


@cache
def chat_template(*, multimodal: bool = True) -> str:
    """Returns the Jinja source; without `multimodal` it refuses media content."""
    file = resources.files("xoron_core.tokens").joinpath("chat_template.jinja")
    text = file.read_text(encoding="utf-8")
    return text if multimodal else _TEXT_ONLY + text


def apply_chat_template_to_tokenizer(
    tokenizer: _T,
    multimodal: bool = True,
    *,
    placeholders: Mapping[str, str] | None = None,
    markers: Mapping[str, tuple[str, str]] | None = None,
) -> _T:
    """Gives the tokenizer our chat template, in place.

    Args:
        tokenizer: whose token space has the groups `control` and `conversation` (and
            `multimodal`, `reasoning`, `tools` for what uses them).
        multimodal: whether message content may hold media.
        placeholders: modality to the special token that stands for its media, if not
            `<|MODALITY_pad|>`.
        markers: modality to the special tokens around media that are shown, if not `<|MODALITY|>`
            and `<|/MODALITY|>`.

    Returns:
        the same tokenizer.
    """
    template = chat_template(multimodal=multimodal)
    for name, chosen in (("placeholders", placeholders), ("markers", markers)):
        if chosen:
            template = f"{{%- set {name} = {json.dumps(dict(chosen))} -%}}\n{template}"
    tokenizer.chat_template = template
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    assistant_spans: bool = False,
    **template: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    Args:
        tokenizer: with a chat template.
        messages: one conversation.
        assistant_spans: whether what assistants say must be found.
        **template: `tools`, `documents`, `add_generation_prompt`, `continue_final_message` and
            the template's own variables.

    Returns:
        the text, and the character spans [start, end) of what assistants say: the generation
        blocks of the template, or, for a template without them and only if asked for, what each
        assistant message adds behind its generation prompt.

    Raises:
        SequenceError: if there is no template or no message, if the template refuses the
            messages, or if a template without generation blocks rewrites earlier turns.
    """
    if tokenizer.chat_template is None:
        raise SequenceError(
            "the tokenizer has no chat template; give it ours with"
            " apply_chat_template_to_tokenizer(tokenizer)"
        )
    if not messages:
        raise SequenceError("no messages were given; expected a list of {role, content}")
    source = tokenizer.get_chat_template(tools=template.get("tools"))
    if _GENERATION.search(source) and not template.get("continue_final_message"):
        return _render(tokenizer, source, messages, spans=True, **template)
    text, _ = _render(tokenizer, source, messages, spans=False, **template)
    if not assistant_spans:
        return text, []
    return text, _spans_by_prefix(tokenizer, source, messages, text=text, **template)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: Sequence[Message],
    *,
    spans: bool,
    **template: Any,
) -> tuple[str, list[tuple[int, int]]]:
    # None means absent: templates test `is defined`.
    cleaned = [{k: v for k, v in message.items() if v is not None} for message in messages]
    variables = {**tokenizer.special_tokens_map, **template}
    try:
        texts, found = render_jinja_template(
            conversations=[cleaned],
            chat_template=source,
            return_assistant_tokens_mask=spans,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise SequenceError(f"the chat template refuses these messages: {error.message}") from None
    return texts[0], list(found[0]) if spans else []


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: Sequence[Message],
    *,
    text: str,
    **template: Any,
) -> list[tuple[int, int]]:
    spans = []
    template = {**template, "continue_final_message": False}
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise SequenceError("the first message is an assistant's; begin with a user or system")
        prompt = {**template, "add_generation_prompt": True}
        done = {**template, "add_generation_prompt": False}
        before, _ = _render(tokenizer, source, messages[:index], spans=False, **prompt)
        after, _ = _render(tokenizer, source, messages[: index + 1], spans=False, **done)
        if not (text.startswith(after) and after.startswith(before)):
            raise SequenceError(
                f"message {index}: the chat template has no generation blocks and renders earlier"
                " turns differently, so what the assistant says cannot be found; compose with"
                " tokens.template: xoron, or train on single turns"
            )
        spans.append((len(before), len(after)))
    return spans
