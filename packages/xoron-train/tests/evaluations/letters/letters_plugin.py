"""A plug-in with a modality of its own, words of capital letters, and a model made by hand."""

from __future__ import annotations

from xoron_core.descriptors import Component, Modality, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1

_MARKERS = {
    "begin": "<|word|>",
    "end": "<|/word|>",
    "gen_begin": "<|gen_word|>",
    "gen_end": "<|/gen_word|>",
    "placeholder": "<|word_pad|>",
}


@hookimpl
def xoron_components() -> list[Component]:
    def part(kind, name, modality, cls):
        groups = ("xoron-letters/word",) if modality == "word" else ()
        factory, config = f"letters_parts:{cls}", f"letters_parts:{cls}Config"
        return Component(kind, name, modality, factory, config, cls, token_groups=groups)

    return [
        part("encoder", "letters", "word", "LetterEncoder"),
        part("projector", "letters", "word", "LetterProjector"),
        part("codec", "letters", "word", "LetterCodec"),
        part("backbone", "speller", "text", "Speller"),
    ]


@hookimpl
def xoron_modalities() -> list[Modality]:
    return [Modality("word", ("word",), **_MARKERS, load="letters_parts:load")]


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    return [TokenGroup("xoron-letters/word", _MARKERS)]
