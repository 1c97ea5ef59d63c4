"""Messages to ids, so that what people write in them can never become a special token.

`encode_chat` renders the chat template. If no message or tool holds anything that looks like a
special token, the result is encoded as `tokenizer.apply_chat_template` would. Otherwise the first
character of each look-alike is replaced *before* rendering by a mark, a character that occurs
nowhere in the data; the rendered text is cut at the special tokens that the template itself wrote,
the marks are put back, and what lies between the cuts is encoded as text.

Footguns
- A look-alike may be spread over two content parts (`<|us` + `er|>`): the tail of a string that
  could begin one counts as a look-alike too.
- `parse_markup=True` is for training data that writes special tokens on purpose; never for input
  from outside.
- Byte-level tokenizers encode the stretches between special tokens independently, so cutting
  changes no id there. A tokenizer that prepends a space to a text does so after each cut.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from xoron_core.errors import SequenceError
from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.template import Message, render
from xoron_core.tokens.tokenizer import (
    check_unicode,
    control_tokens,
    encode_text,
    group_advice,
)

# What our strings and those of a third party's modality look like.
_SHAPE = r"<\|[^|<>\s]{1,64}\|>"
# In content, white space too: JSON writes a line break of a tool's description as two letters.
_WRITTEN = r"<\|[^|<>]{1,64}\|>"
_WRITTEN_TAIL = r"<(?:\|(?:[^|<>]{0,64}(?:(?<!<\|)\|)?)?)?\Z"
# Marks: hieroglyphs, then rare ideographs. JSON, Python's repr and string methods keep them as they
# are, which is not true of private-use characters.
_MARKS = (*range(0x13000, 0x13430), *range(0x20000, 0x2A6D0))


@dataclass(frozen=True)
class ChatEncoding:
    """An encoded conversation of n ids.

    Attributes:
        input_ids: n ids.
        assistant_mask: n flags, True where an assistant says it, or None if not asked for.
        text: the rendered conversation.
    """

    input_ids: list[int]
    assistant_mask: list[bool] | None
    text: str


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    space: TokenSpace,
    messages: Sequence[Message],
    *,
    return_assistant_mask: bool = False,
    parse_markup: bool = False,
    media: Mapping[str, tuple[str, str]] | None = None,
    **template: Any,
) -> ChatEncoding:
    """Renders and encodes one conversation.

    Args:
        tokenizer: generated from `space`, with a chat template.
        space: the token space.
        messages: Hugging Face chat messages.
        return_assistant_mask: whether to mark what assistants say, end marker included.
        parse_markup: whether special tokens written inside the content are meant.
        media: for a template that knows text only: content type to what stands for a medium that
            is shown, and for one that an assistant makes. Contents become strings before rendering.
        **template: `tools`, `add_generation_prompt`, `enable_thinking` and whatever else the
            template takes.

    Raises:
        SequenceError: if the template refuses the messages, or writes a special token that the
            space lacks (the group to select is named).
    """
    rules = _rules(tokenizer)
    if tools := template.get("tools"):
        template["tools"] = [get_json_schema(t) if callable(t) else t for t in tools]
    shield = _Shield(rules, [messages, template, tokenizer.chat_template])
    if not parse_markup:
        messages = [shield.hide(message) for message in messages]
        template = {name: shield.hide(value) for name, value in template.items()}
    if media is not None:
        messages = [_as_text(message, media) for message in messages]
    text, spans = render(tokenizer, messages, assistant_spans=return_assistant_mask, **template)
    check_unicode(text)
    _check_rendered(space, rules, shield, text=text)
    if shield.hidden:
        ids, mask = _encode_pieces(tokenizer, rules, shield, text=text, spans=spans)
        text = shield.show(text)
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, mask = encoded["input_ids"], _mask(encoded["offset_mapping"], spans)
    return ChatEncoding(ids, mask if return_assistant_mask else None, text)


def _as_text(message: Message, media: Mapping[str, tuple[str, str]]) -> Message:
    """A message whose content is one string, with markers where media stand."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    made = message.get("role") == "assistant"
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    texts = [p["text"] if p["type"] == "text" else media[p["type"]][made] for p in parts]
    return {**message, "content": "".join(texts)}


@dataclass(frozen=True)
class _Rules:
    """What steers the model of one tokenizer: strings with ids, as patterns.

    `look_alike` matches the one character at which something begins that is, or could grow into,
    a control token or a medium's marker; looking ahead finds overlapping ones too.
    """

    ids: Mapping[str, int]
    token: re.Pattern[str]
    look_alike: re.Pattern[str]


_RULES: WeakKeyDictionary[PreTrainedTokenizerBase, _Rules] = WeakKeyDictionary()


def _rules(tokenizer: PreTrainedTokenizerBase) -> _Rules:
    ids = control_tokens(tokenizer)
    cached = _RULES.get(tokenizer)
    if cached is None or cached.ids is not ids:
        strings = sorted(ids, key=lambda s: (-len(s), s))
        odd = [string for string in strings if not re.fullmatch(_SHAPE, string)]
        heads = sorted({string[:n] for string in odd for n in range(1, len(string))})
        tokens = [re.escape(string) for string in strings]
        starts = [*tokens, _WRITTEN, _WRITTEN_TAIL, *(rf"{re.escape(head)}\Z" for head in heads)]
        cached = _RULES[tokenizer] = _Rules(
            ids,
            re.compile("|".join(tokens) or "(?!)"),
            re.compile(f"(?={'|'.join(starts)}).", re.DOTALL),
        )
    return cached


class _Shield:
    """Replaces the first character of look-alikes by a mark that occurs nowhere in the data."""

    def __init__(self, rules: _Rules, data: Any) -> None:
        self._pattern = rules.look_alike
        self._data = data
        self._free: Iterator[str] | None = None
        self._marks: dict[str, str] = {}
        self.hidden: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """Returns a copy of nested data whose strings, keys included, hold no look-alike."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._mark(match.group()), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        return value

    def show(self, text: str) -> str:
        """Puts the look-alikes back; lengths do not change."""
        return text.translate({ord(mark): first for mark, first in self.hidden.items()})

    def _mark(self, first: str) -> str:
        if first not in self._marks:
            if self._free is None:
                used = set(itertools.chain.from_iterable(_strings(self._data)))
                self._free = (chr(c) for c in _MARKS if chr(c) not in used)
            mark = next(self._free, None)
            if mark is None:
                raise SequenceError(
                    "the messages use every character that could mark a look-alike of a special"
                    " token; split the conversation"
                )
            self._marks[first] = mark
            self.hidden[mark] = first
        return self._marks[first]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _check_rendered(space: TokenSpace, rules: _Rules, shield: _Shield, *, text: str) -> None:
    """Refuses text whose markers would be spelled out letter by letter."""
    written = dict.fromkeys(re.findall(_SHAPE, text))
    # With a mark inside, it is content around a look-alike: `<|us<|` and `>` in two parts.
    missing = [s for s in written if s not in rules.ids and shield.hidden.keys().isdisjoint(s)]
    if missing:
        raise SequenceError(
            f"the conversation is rendered with {', '.join(missing)}, which this token space"
            f" ({len(space.special_ids)} special tokens) lacks; {group_advice(missing)}"
        )


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase,
    rules: _Rules,
    shield: _Shield,
    *,
    text: str,
    spans: Sequence[tuple[int, int]],
) -> tuple[list[int], list[bool]]:
    """Encodes rendered text between special tokens, with the look-alikes put back as text.

    It is cut at the ends of the assistant spans too: there a prompt ends and an answer begins.
    """
    ids: list[int] = []
    mask: list[bool] = []
    edges = sorted({0, len(text), *itertools.chain.from_iterable(spans)})
    for start, end in itertools.pairwise(edges):
        said = any(first <= start < last for first, last in spans)
        position = start
        for match in rules.token.finditer(text, start, end):
            ids += encode_text(tokenizer, shield.show(text[position : match.start()]))
            ids.append(rules.ids[match.group()])
            position = match.end()
        ids += encode_text(tokenizer, shield.show(text[position:end]))
        mask += [said] * (len(ids) - len(mask))
    return ids, mask


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        mask |= (ends > start) & (starts < end)
    return mask.tolist()
