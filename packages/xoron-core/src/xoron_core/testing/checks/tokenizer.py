"""Tokenizers: what they say of their base vocabulary is true, and text comes back."""

from __future__ import annotations

import unicodedata

from xoron_core.testing.catalogue import check
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject

TOKENIZER = ("tokenizer",)
TEXTS = (
    "plain words, and 12,345.67 numbers",
    "  leading, trailing and  double spaces \n\n\tand tabs",
    "Grüße, Ελλάδα, 日本語, العربية, 🙂👩‍🚀",
    "def f(x):\n    return {'a': [x ** 2]}",
    "e\u0301 is not composed",
)


@check(
    "tokenizer-base",
    TOKENIZER,
    since=1,
    summary="text_base says how large the base is",
    needs=("build",),
)
def tokenizer_base(subject: Subject) -> None:
    part, again = subject.build(), subject.build()
    where, base = subject.component.factory, part.text_base()
    if base != again.text_base():
        raise CheckFailed(f"{where}.text_base gives something else for the same config")
    tokenizer = subject.base_tokenizer
    ids = sorted(tokenizer.get_vocab().values())
    if not ids or ids[0] != 0 or ids[-1] != base.size - 1:
        raise CheckFailed(
            f"{where}.text_base says {base.size} ids, but those of base() go from"
            f" {ids[0] if ids else 'nothing'} to {ids[-1] if ids else 'nothing'}; size is the"
            " highest id and one more"
        )
    for string, number in base.owned.items():
        if (found := tokenizer.convert_tokens_to_ids(string)) != number:
            raise CheckFailed(
                f"{where}.text_base owns {string!r} at {number}, but base() has it at {found}"
            )


@check(
    "tokenizer-round-trip",
    TOKENIZER,
    since=1,
    summary="text comes back as it was (or as `normalization` makes it)",
    needs=("build", "tokenizer-base"),
)
def tokenizer_round_trip(subject: Subject) -> None:
    part = subject.build()
    where, base = subject.component.factory, part.text_base()
    tokenizer = subject.base_tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids or not 0 <= min(ids) <= max(ids) < base.size:
            raise CheckFailed(f"{where}.base: {text!r} gives ids outside 0 .. {base.size - 1}")
        got = tokenizer.decode(ids)
        wanted = unicodedata.normalize(base.normalization, text) if base.normalization else text
        if got != wanted:
            raise CheckFailed(
                f"{where}.base: {text!r} comes back as {got!r}, expected {wanted!r}; decode must"
                " clean nothing up, and text_base().normalization must name what encode does"
            )
