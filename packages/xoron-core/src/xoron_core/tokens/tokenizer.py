"""The Hugging Face tokenizer generated from a token space, and the two ways to encode with it.

`tokenizer.json` is a product of `token_space.json`: every special token stands with its explicit
id in the model vocabulary *and* in the added tokens.

Footguns
- `add_tokens` numbers from the end of the vocabulary and so renumbers behind a hole, silently; a
  string that is in the model vocabulary keeps its id. That is why the JSON is written by hand.
- `len(tokenizer)` is not the number of rows: holes and codec ids have no text. Use `space.size`.
- Ids without text (holes, codec ids) are skipped by `decode`; `convert_ids_to_tokens` gives None.
- `tokenizer(text)` parses markup: it turns `<|user|>` typed by a user into the special token. Use
  `encode_text` for what people write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from xoron_core.errors import SequenceError, TokenSpaceError
from xoron_core.tokens.space import TextBase, TokenSpace
from xoron_core.tokens.special_tokens import catalogue
from xoron_core.tokens.stream import StreamDecoder

__all__ = [
    "StreamDecoder",
    "build_tokenizer",
    "check_unicode",
    "control_tokens",
    "encode_markup",
    "encode_text",
    "group_advice",
    "text_base",
]


def text_base(
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    base_specials: Literal["keep", "drop"] = "keep",
) -> TextBase:
    """Describes a base tokenizer for the token space.

    Args:
        tokenizer: a fast BPE tokenizer.
        name: `distribution/name`, e.g. `xoron-llm/qwen2.5`.
        base_specials: `keep` counts the base's added tokens in (mandatory over pretrained
            weights); `drop` leaves its vocabulary alone.

    Raises:
        TokenSpaceError: if it is no fast BPE tokenizer.
    """
    data = _backend_data(tokenizer)
    vocab: Mapping[str, int] = data["model"]["vocab"]
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    if base_specials == "drop":
        added = {string: number for string, number in added.items() if string in vocab}
    meaning = {key: data[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder")}
    text = json.dumps([meaning, sorted(added.items())], sort_keys=True)
    return TextBase(
        name=name,
        size=max([*vocab.values(), *added.values()]) + 1,
        identity=f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        owned=added,
        normalization=_normalization(data["normalizer"]),
    )


def build_tokenizer(
    space: TokenSpace,
    base: PreTrainedTokenizerBase,
    *,
    control: Literal["xoron", "base"] = "xoron",
    chat_template: str | None = None,
    bos: str = "bos",
    eos: str = "eos",
    pad: str = "pad",
) -> PreTrainedTokenizerFast:
    """Generates the tokenizer of a space.

    Args:
        space: the authority on ids; it must have a text base.
        base: the base tokenizer, whose ids below `space.text_size` are taken as they are. Added
            tokens of its own at or above it are left out (`base_specials: drop`).
        control: `xoron` sets our BOS, EOS and PAD and adds none of them by itself; `base` keeps
            those of the base, how it adds them, and its chat template. A base without PAD then
            pads with its EOS.
        chat_template: a Jinja template; None is the base's with `control="base"`, else none.
        bos, eos, pad: names or strings of special tokens of the space, for `control="xoron"`.

    Raises:
        TokenSpaceError: if the base is no fast BPE tokenizer, does not fit the space, or a
            control token is in no selected group.
    """
    if space.text is None:
        raise TokenSpaceError("this token space has no text base, so it has no tokenizer")
    data = _backend_data(base)
    _check_base(space, data)
    _write_specials(space, data)
    data["post_processor"] = _post_processor(data["post_processor"], keep=control == "base")
    data["truncation"] = data["padding"] = None
    if control == "base":
        controls = _base_controls(space, base)
        chat_template = chat_template or base.chat_template
    else:
        controls = {
            "bos_token": _control(space, bos),
            "eos_token": _control(space, eos),
            "pad_token": _control(space, pad),
        }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(json.dumps(data)),
        clean_up_tokenization_spaces=False,
        **controls,
    )
    tokenizer.chat_template = chat_template
    _check_ids(space, tokenizer)
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes what people write: what looks like a control token (`control_tokens`) stays text.

    No BOS or EOS is added. The base's normalisation applies (Qwen's is NFC).

    Raises:
        SequenceError: if the text holds a lone surrogate, which no UTF-8 can carry.
    """
    check_unicode(text)
    return _encode_plain(tokenizer, text, control_tokens(tokenizer))


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes text in which special tokens are meant: templates, trusted training markup.

    Raises:
        SequenceError: as `encode_text`.
    """
    check_unicode(text)
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False)
    return cast(list[int], encoded["input_ids"])


def group_advice(strings: Iterable[str]) -> str:
    """Returns which groups to select for special strings that a space lacks."""
    owners = {s: entry for entry in catalogue() for s in entry.tokens.values()}
    groups = sorted({owners[s].name for s in strings if s in owners})
    if not groups:
        return "select the group of the plug-in that brings them in tokens.groups"
    return f"add to tokens.groups of the composition: {', '.join(groups)}"


def check_unicode(text: str) -> None:
    """Refuses text that no UTF-8 can carry.

    Raises:
        SequenceError: with the first lone surrogate and its position.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SequenceError(
            f"the text holds a lone surrogate ({text[error.start]!r}) at position {error.start};"
            " decode its source with errors='replace'"
        ) from None


_CONTROL: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, dict[str, int]]]
_CONTROL = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the added tokens that steer the model, with their ids.

    These are the special ones, and those of a base that its chat template writes though they are
    not marked special (Qwen's `<tool_call>`). Other added tokens (runs of spaces, HTML tags) are
    how a base spells ordinary text.
    """
    template = tokenizer.chat_template
    cached = _CONTROL.get(tokenizer)
    if cached is None or cached[0] != template:
        written = json.dumps(template, ensure_ascii=False) if template else ""
        found = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in written)
        }
        cached = _CONTROL[tokenizer] = (template, found)
    return cached[1]


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, text: str, control: Mapping[str, int]
) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    ids = cast(list[int], encoded["input_ids"])
    seen = set(ids)
    parsed = [string for string, number in control.items() if number in seen]
    if not parsed:
        return ids
    # The base does not mark it special, or its model looks whole words up before it merges
    # (`ignore_merges`). Cut behind its first character it is no longer there to be found.
    pattern = "|".join(map(re.escape, parsed))
    cuts = [match.start() + 1 for match in re.finditer(f"(?={pattern})", text)]
    edges = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    if len(edges) == 2:
        raise SequenceError(
            f"this tokenizer spells {text!r} with its control token {parsed[0]!r}, so it cannot be"
            " kept as text"
        )
    pieces = (text[start:end] for start, end in pairwise(edges))
    return [number for piece in pieces for number in _encode_plain(tokenizer, piece, control)]


def _backend_data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__
    if not isinstance(backend, Backend):
        raise TokenSpaceError(f"the base tokenizer is a slow {kind}; expected a fast one")
    data: dict[str, Any] = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE":
        raise TokenSpaceError(
            f"the base tokenizer {kind} has a {data['model']['type']} model; expected BPE, the"
            " model whose vocabulary can hold explicit ids"
        )
    return data


def _check_base(space: TokenSpace, data: Mapping[str, Any]) -> None:
    size = space.text_size
    vocab: Mapping[str, int] = data["model"]["vocab"]
    beyond = [(string, number) for string, number in vocab.items() if number >= size]
    if beyond:
        string, number = min(beyond, key=lambda item: item[1])
        raise TokenSpaceError(
            f"the base vocabulary has {string!r} at {number}, but the text base of the token space"
            f" has {size} ids; build the token space from this tokenizer"
        )
    known = dict(vocab) | {t["content"]: t["id"] for t in data["added_tokens"] if t["id"] < size}
    for special in space:
        if known.get(special.string) != (special.id if special.alias else None):
            raise TokenSpaceError(
                f"special token {special.key!r} ({special.string!r}) has id {special.id} in the"
                f" token space and {known.get(special.string)} in the base tokenizer; the text"
                " base must own the strings that its vocabulary holds"
            )


def _write_specials(space: TokenSpace, data: dict[str, Any]) -> None:
    added = {t["content"]: t for t in data["added_tokens"] if t["id"] < space.text_size}
    for special in space:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token = added.get(special.string, {"id": special.id, "content": special.string, **flags})
        added[special.string] = {**token, "special": True}
    for token in added.values():
        # The base's own added tokens need an explicit id as much as ours.
        data["model"]["vocab"][token["content"]] = token["id"]
    data["added_tokens"] = sorted(added.values(), key=lambda t: t["id"])


def _post_processor(processor: dict[str, Any] | None, *, keep: bool) -> dict[str, Any] | None:
    """Drops what adds the base's BOS unless `keep`, and makes offsets exact.

    Trimmed offsets give white space an empty span, and assistant masks would lose it.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return processor and {**processor, "trim_offsets": False}
    if not keep:
        return None
    if processor["type"] == "Sequence":
        parts = [_post_processor(part, keep=keep) for part in processor["processors"]]
        return {**processor, "processors": parts}
    return processor


def _control(space: TokenSpace, word: str) -> str:
    found = space.find(word)
    if found is None:
        string = next((e.tokens[word] for e in catalogue() if word in e.tokens), word)
        raise TokenSpaceError(
            f"control token {word!r} is not in the token space; {group_advice([string])}"
        )
    return found.string


def _base_controls(space: TokenSpace, base: PreTrainedTokenizerBase) -> dict[str, str]:
    controls: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        string = getattr(base, name)
        if string is None:
            continue
        if base.convert_tokens_to_ids(string) >= space.text_size:
            raise TokenSpaceError(
                f"the base's {name} {string!r} is not in the token space, whose text base has"
                f" {space.text_size} ids; keep the base's specials or use our control tokens"
            )
        controls[name] = string
    if "eos_token" in controls:
        controls.setdefault("pad_token", controls["eos_token"])
    return controls


def _check_ids(space: TokenSpace, tokenizer: PreTrainedTokenizerFast) -> None:
    vocab = tokenizer.get_vocab()
    for special in space:
        if vocab.get(special.string) != special.id:
            raise TokenSpaceError(
                f"the generated tokenizer gives {special.string!r} id"
                f" {vocab.get(special.string)}, the token space has {special.id}; this version of"
                " tokenizers does not keep explicit ids, upgrade it: pip install -U tokenizers"
            )


def _normalization(normalizer: Mapping[str, Any] | None) -> str | None:
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        return "+".join(str(_normalization(part)) for part in normalizer["normalizers"]) or None
    return str(normalizer["type"])
