"""Proves the catalogue: complete against the published documents, unique, owned, selectable, and
that stripping hidden content removes exactly that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import ConfigError, PluginError
from xoron_core.tokens.special_tokens import (
    ALIASES,
    REASONING_TOKENS,
    SPECIAL_TOKENS,
    UNCERTAINTY_TOKENS,
    catalogue,
    core_groups,
    get_reasoning_tokens,
    get_special_tokens_list,
    groups_of,
    pairs,
    select,
    strip_hidden_tokens,
)

DATA = Path(__file__).parent.parent / "data"
PUBLISHED_COUNT = 542
OURS = {
    "idk",
    "confident",
    "gen_audio_start",
    "gen_audio_end",
    "image_pad",
    "video_pad",
    "audio_pad",
}


def test_every_string_of_the_published_documents_is_known():
    published = json.loads((DATA / "published_special_strings.json").read_text(encoding="utf-8"))
    assert len(published) > 50
    known = {*SPECIAL_TOKENS.values(), *ALIASES}
    assert [string for string in published if string not in known] == []


def test_every_name_of_the_published_list_is_there_and_no_string_is_used_twice():
    published = json.loads((DATA / "published_special_tokens.json").read_text(encoding="utf-8"))
    assert len(published) == PUBLISHED_COUNT
    assert set(SPECIAL_TOKENS) == {*published, *OURS}
    assert len(set(SPECIAL_TOKENS.values())) == len(SPECIAL_TOKENS) == PUBLISHED_COUNT + len(OURS)
    changed = {name for name, string in published.items() if SPECIAL_TOKENS[name] != string}
    assert changed == {"key_signature", "key_signature_end"}  # `<|key|>` is structured data's
    assert get_special_tokens_list() == list(SPECIAL_TOKENS.values())


def test_names_and_keys_are_unique_over_all_groups():
    names = [name for entry in catalogue() for name in entry.tokens]
    assert len(names) == len(set(names)) == len(SPECIAL_TOKENS)
    keys = [entry.key for entry in catalogue()]
    assert len(keys) == len(set(keys))
    for entry in catalogue():
        assert entry.hidden <= set(entry.tokens)
        assert entry.title


def test_owners():
    later = {"xoron-video": {"temporal"}}
    later["xoron-audio"] = {
        "voice",
        "audio_prompt",
        "interruption",
        "emotion",
        "singing",
        "sound_effects",
    }
    for owner, keys in later.items():
        assert {group.name for group in groups_of(owner)} == {f"{owner}/{key}" for key in keys}
    assert len(core_groups()) + 7 == len(catalogue())
    assert {entry.owner for entry in catalogue()} == {"xoron-core", *later}


def test_aliases_lead_to_tokens():
    for alias, target in ALIASES.items():
        assert alias not in SPECIAL_TOKENS
        assert alias not in SPECIAL_TOKENS.values()
        assert target in SPECIAL_TOKENS or target in SPECIAL_TOKENS.values()


def test_the_published_dictionaries():
    assert REASONING_TOKENS["think_start"] == "<|think|>"
    assert REASONING_TOKENS["plan_start"] == "<|plan|>"
    assert get_reasoning_tokens() == REASONING_TOKENS
    assert get_reasoning_tokens() is not REASONING_TOKENS
    assert UNCERTAINTY_TOKENS["idk"] == "<|idk|>"
    assert {**REASONING_TOKENS, **UNCERTAINTY_TOKENS}.items() <= SPECIAL_TOKENS.items()


def test_pairs_are_found_by_name_and_by_string():
    found = pairs(SPECIAL_TOKENS)
    ends = {s for n, s in SPECIAL_TOKENS.items() if n.endswith("_end")}
    assert set(found.values()) == ends  # every end has exactly one begin
    assert len(found) == len(ends)
    assert found["]~b]"] == "]~!b["
    assert found["<|exec_result|>"] == "<|/exec_result|>"
    assert found["<|arousal|>"] == "<|/arousal|>"
    assert "<|bos|>" not in found
    assert "<|image_pad|>" not in found


def test_selecting_groups():
    available = [*core_groups(), TokenGroup("ecg/leads", {"lead": "<|lead|>"})]
    names = [g.name for g in select(["leads", "multimodal", "control"], available)]
    assert names == ["xoron-core/control", "xoron-core/multimodal", "ecg/leads"]
    by_name = {g.name: g for g in available}
    assert select(["control", "xoron-core/control"], by_name) == [available[0]]
    assert select("all", available) == available
    with pytest.raises(ConfigError, match="Did you mean 'multimodal'"):
        select(["multimodel"], available)
    with pytest.raises(PluginError, match="pip install xoron-audio"):
        select(["emotion"], available)
    with pytest.raises(PluginError, match="pip install xoron-video"):
        select(["xoron-video/temporal"], available)
    with pytest.raises(ConfigError, match="ecg/leads, eeg/leads"):
        select(["leads"], [*available, TokenGroup("eeg/leads", {"x": "<|x|>"})])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain <b>text</b> <|code|>x<|/code|>", "plain <b>text</b> <|code|>x<|/code|>"),
        ("<|think|>secret<|/think|>\nanswer", "\nanswer"),
        ("a<|plan|>p<|plan_step|>q<|/plan_step|>r<|/plan|>b", "ab"),
        ("a<|think|>x<|think|>y<|/think|>z<|/think|>b", "ab"),
        ("a<|think|>x<|plan|>never closed<|/think|>b", "ab"),
        ("a<|critique|>never closed", "a"),
        ("a<|/think|>b<|bos|>c<|eos|>", "abc"),
        ("a[e~[hidden]~e]b]~b]state]~!b[c", "abc"),
        ("<|working_memory|>m<|/working_memory|>", ""),
        ("", ""),
    ],
)
def test_stripping_hidden_content(text, shown):
    assert strip_hidden_tokens(text) == shown


VISIBLE = st.text(alphabet="ab <|>/\n[~]", max_size=8)


@given(st.lists(st.tuples(VISIBLE, VISIBLE), max_size=6), VISIBLE)
def test_stripping_leaves_the_visible_text_as_it_is(pieces, rest):
    """Hidden blocks put between pieces of visible text vanish, the pieces stay."""
    hidden = {"\x01": "\x02", "\x03": None}
    text = "".join(f"{shown}\x01{secret}\x03\x02\x03" for shown, secret in pieces) + rest
    stripped = strip_hidden_tokens(text, hidden=hidden)
    assert stripped == "".join(shown for shown, _ in pieces) + rest
    assert strip_hidden_tokens(rest, hidden={}) == rest


def test_the_package_is_light():
    code = (
        "import sys, xoron_core.tokens as t; t.catalogue();"
        "heavy = ('torch', 'transformers', 'pydantic', 'tokenizers');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
