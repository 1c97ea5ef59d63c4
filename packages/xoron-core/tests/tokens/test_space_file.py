"""Proves `token_space.json`: the hash ignores what is no meaning and changes with every change of
meaning; a file with any single leaf changed is refused; damage is named.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import FolderError, TokenSpaceError
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_core.tokens.special_tokens import core_groups

TEXT = TextBase("test/base", 20, "vocabulary", {"<|fim_prefix|>": 11, "<|own|>": 12}, "NFC")
CORE = {group.name.partition("/")[2]: group for group in core_groups()}
GROUPS = [
    CORE["control"],
    CORE["fim"],
    TokenGroup("ecg/leads", {"lead": "<|lead|>", "lead_end": "<|/lead|>"}, frozenset({"lead"})),
    TokenGroup("abc/first", {"mark": "<|mark|>"}),
]
CODECS = [
    CodecRange("toy/a", 0, 5, "a0", 25.0, "signal"),
    CodecRange("toy/a", 1, 5, "a1", 25.0, "signal", delay=2),
    CodecRange("toy/b", 0, 3, "b0", None, "image"),
]


def space(groups=GROUPS, codecs=CODECS, lock=None, text=TEXT) -> TokenSpace:
    return TokenSpace.allocate(text=text, groups=groups, codecs=codecs, lock=lock)


@pytest.mark.parametrize(
    "other",
    [
        lambda: space(text=replace(TEXT, name="test/other")),
        lambda: space(text=replace(TEXT, size=21)),
        lambda: space(text=replace(TEXT, identity="other")),
        lambda: space(text=replace(TEXT, normalization=None)),
        lambda: space(text=replace(TEXT, owned={**TEXT.owned, "<|x|>": 3})),
        lambda: space(GROUPS[1:]),
        lambda: space([*GROUPS[:-1], replace(GROUPS[-1], name="abc/second")]),
        lambda: space([*GROUPS[:-1], replace(GROUPS[-1], tokens={"mork": "<|mark|>"})]),
        lambda: space([*GROUPS[:-1], replace(GROUPS[-1], tokens={"mark": "<|mork|>"})]),
        lambda: space(codecs=CODECS[:2]),
        lambda: space(codecs=[*CODECS[:2], replace(CODECS[2], identity="new")]),
        lambda: space(codecs=[*CODECS[:2], replace(CODECS[2], rate=12.5)]),
        lambda: space(codecs=[*CODECS[:2], replace(CODECS[2], size=2)]),
        lambda: space(codecs=[*CODECS[:2], replace(CODECS[2], modality="video")]),
        lambda: space(codecs=[CODECS[0], replace(CODECS[1], delay=1), CODECS[2]]),
        lambda: space(codecs=CODECS[:2], lock=space()),
    ],
)
def test_every_change_of_meaning_changes_the_hash(other):
    assert other().hash != space().hash


def test_the_hash_ignores_what_is_no_meaning(tmp_path: Path):
    now = space()
    shown = replace(GROUPS[2], hidden=frozenset())
    assert space([*GROUPS[:2], shown, GROUPS[3]]).hash == now.hash
    reordered = replace(TEXT, owned=dict(reversed(TEXT.owned.items())))
    assert space(text=reordered).hash == now.hash
    whole = [replace(CODECS[0], rate=25), replace(CODECS[1], rate=25), CODECS[2]]
    assert space(codecs=whole).hash == now.hash
    (tmp_path / "folder").mkdir()
    now.save(tmp_path / "folder")
    now.save(tmp_path / "elsewhere.json")
    texts = [(tmp_path / p).read_bytes() for p in ("folder/token_space.json", "elsewhere.json")]
    assert texts[0] == texts[1]
    data = json.loads(texts[0])
    shuffled = dict(random.Random(0).sample(list(data.items()), len(data)))  # noqa: S311
    shuffled["text"] = dict(reversed(data["text"].items()))
    assert TokenSpace.from_json(json.dumps(shuffled, indent=7)) == now
    assert TokenSpace.load(tmp_path / "folder").hash == now.hash


def leaves(data, path=()):
    """Every scalar of nested JSON with its path."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in items:
            yield from leaves(value, (*path, key))
    else:
        yield path, data


def test_a_file_with_any_leaf_changed_is_refused():
    now = space(GROUPS[1:], CODECS[:2], space())
    for path, value in leaves(json.loads(now.to_json())):
        if path[-1] == "hidden":
            continue
        data = json.loads(now.to_json())
        target = data
        for key in path[:-1]:
            target = target[key]
        if isinstance(value, bool):
            target[path[-1]] = not value
        elif isinstance(value, int | float):
            target[path[-1]] = value + 1
        else:
            target[path[-1]] = f"{value or 'x'}y"
        with pytest.raises(TokenSpaceError):
            TokenSpace.from_json(json.dumps(data))


def test_a_delay_is_written_only_where_there_is_one():
    """Files and hashes of spaces without delays stay those of before there were any."""
    entries = json.loads(space().to_json())["codecs"]
    assert [entry.get("delay") for entry in entries] == [None, 2, None]
    assert TokenSpace.from_json(space().to_json()).codecs[1].range.delay == 2
    entries[0]["delay"] = "1"
    data = json.loads(space().to_json()) | {"codecs": entries}
    with pytest.raises(TokenSpaceError, match="'delay' must be int, got '1'"):
        TokenSpace.from_json(json.dumps(data))


def test_a_tampered_file_names_both_hashes():
    now = space()
    text = now.to_json().replace('"b0"', '"b1"')
    with pytest.raises(TokenSpaceError) as caught:
        TokenSpace.from_json(text)
    assert now.hash in str(caught.value)
    assert space(codecs=[*CODECS[:2], replace(CODECS[2], identity="b1")]).hash in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path):
    file = tmp_path / "token_space.json"
    with pytest.raises(FolderError, match=r"token_space.json: cannot be read \(No such file"):
        TokenSpace.load(file)
    text = space().to_json()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(FolderError, match="truncated or damaged"):
        TokenSpace.load(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FolderError, match="not UTF-8"):
        TokenSpace.load(file)
    file.write_text("[1, 2]")
    with pytest.raises(TokenSpaceError, match="no 'format'"):
        TokenSpace.load(file)
    file.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(TokenSpaceError, match=r"format 2.*pip install -U xoron-core"):
        TokenSpace.load(file)
    file.write_text(text.replace('"codecs"', '"codex"'))
    with pytest.raises(TokenSpaceError, match="Did you mean 'codecs'"):
        TokenSpace.load(file)


def test_another_hash_is_refused_with_both_and_the_place():
    now, other = space(), space(GROUPS[1:])
    now.require_same(now.hash, where="shard-3")
    with pytest.raises(TokenSpaceError) as caught:
        now.require_same(other.hash, where="shard-3")
    for part in (now.hash, other.hash, "shard-3"):
        assert part in str(caught.value)
