"""Proves the token space: canonical, append-only under a lock, a bijection, and refusing.

Properties run over random subsets and orders of contributions.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import TokenSpaceError
from xoron_core.tokens.ranges import CodecEntry, Special
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_core.tokens.special_tokens import core_groups, select

TEXT = TextBase("test/base", 20, "vocabulary", {"<|fim_prefix|>": 11, "<|own|>": 12}, "NFC")
CORE = {group.name.partition("/")[2]: group for group in core_groups()}
GROUPS = [
    CORE["control"],
    CORE["conversation"],
    CORE["fim"],
    CORE["special"],
    TokenGroup("ecg/leads", {"lead": "<|lead|>", "lead_end": "<|/lead|>"}, frozenset({"lead"})),
    TokenGroup("abc/first", {"mark": "<|mark|>", "own": "<|own|>"}),
]
CODECS = [
    CodecRange("toy/a", 0, 5, "a0", 25.0, "signal"),
    CodecRange("toy/a", 1, 5, "a1", 25.0, "signal"),
    CodecRange("toy/b", 0, 3, "b0", None, "image"),
]


def space(groups=GROUPS, codecs=CODECS, lock=None, text=TEXT) -> TokenSpace:
    return TokenSpace.allocate(text=text, groups=groups, codecs=codecs, lock=lock)


def meanings(of: TokenSpace) -> dict[str, int]:
    """Name of every live thing to its first id."""
    found = {special.key: special.id for special in of}
    return found | {c.range.full_name: c.start for c in of.codecs if not c.removed}


@st.composite
def contributions(draw):
    """A subset of groups and codecs in random order; a codec keeps its first codebooks."""
    groups = draw(st.lists(st.sampled_from(GROUPS), unique_by=lambda g: g.name))
    books = draw(st.integers(0, 2))
    codecs = CODECS[:books] + ([CODECS[2]] if draw(st.booleans()) else [])
    return groups, draw(st.permutations(codecs))


@given(contributions(), st.randoms())
def test_layout_does_not_depend_on_the_order_of_contributions(chosen, rng):
    groups, codecs = chosen
    shuffled_groups, shuffled_codecs = list(groups), list(codecs)
    rng.shuffle(shuffled_groups)
    rng.shuffle(shuffled_codecs)
    one, two = space(groups, codecs), space(shuffled_groups, shuffled_codecs)
    assert one.to_json() == two.to_json()


@given(st.lists(contributions(), min_size=2, max_size=5))
@settings(max_examples=60)
def test_nothing_moves_under_the_lock(history):
    """Whatever is added, removed and added again, every meaning has one id for ever."""
    for_ever: dict[str, int] = {}
    lock = None
    for groups, codecs in history:
        now = space(groups, codecs, lock)
        for name, number in meanings(now).items():
            assert for_ever.setdefault(name, number) == number
        asked = {f"{g.name}/{n}" for g in groups for n in g.tokens}
        assert set(meanings(now)) == asked | {c.full_name for c in codecs}
        if lock is not None:
            assert now.size >= lock.size
            same = space(groups, codecs, now)
            assert (same.hash, same.to_json()) == (now.hash, now.to_json())
        assert TokenSpace.from_json(now.to_json()) == now
        lock = now


@given(st.lists(contributions(), min_size=1, max_size=3))
@settings(max_examples=40)
def test_ids_and_range_positions_are_a_bijection(history):
    now = None
    for groups, codecs in history:
        now = space(groups, codecs, now)
    assert now is not None
    covered = [number for r in now.ranges for number in range(r.start, r.stop)]
    assert covered == list(range(now.size))
    holes = {s.id for s in now.specials if s.removed}
    for entry in now.codecs:
        if entry.removed:
            holes |= set(range(entry.start, entry.start + entry.range.size))
    live = torch.tensor([i for i in range(now.size) if i not in holes])
    index, local = now.to_local(live)
    assert len({*zip(index.tolist(), local.tolist(), strict=True)}) == len(live)
    for i, found in enumerate(now.ranges):
        ids = live[index == i]
        if len(ids):
            assert torch.equal(now.to_global(found.name, local[index == i]), ids)
    for hole in holes:
        with pytest.raises(TokenSpaceError, match=rf"id {hole} at position \(1, 0\).*hole"):
            now.to_local(torch.tensor([[0], [hole]]))


def test_the_canonical_layout():
    """Text base, core's groups in core's order, others by name, codecs by name and codebook."""
    now = space(GROUPS[::-1], CODECS[::-1])
    names = [r.name for r in now.ranges]
    assert names == [
        "test/base",
        "xoron-core/control",
        "xoron-core/conversation",
        "xoron-core/fim",
        "xoron-core/special",
        "abc/first",
        "ecg/leads",
        "toy/a:0",
        "toy/a:1",
        "toy/b:0",
    ]
    assert now.range("test/base").start == 0
    assert now.id_of("bos") == 20
    assert now.size == 20 + 9 + 6 + 3 + 7 + 1 + 2 + 13


def test_what_else_is_installed_changes_nothing():
    names = ["leads", "control"]
    alone = select(names, [CORE["control"], GROUPS[4]])
    beside = select(names[::-1], [*CORE.values(), *GROUPS[4:]])
    assert space(alone).to_json() == space(beside).to_json()


def test_a_string_of_the_base_is_an_alias_and_no_row():
    now = space()
    assert now.id_of("<|fim_prefix|>") == now.id_of("fim_prefix") == 11
    assert now.id_of("own") == 12
    assert now.special_ids["<|own|>"] == 12
    assert 11 not in now.new_rows(20)
    assert space(GROUPS[:2], [], now).specials[0].alias is False  # an alias leaves no hole


def test_new_rows_are_those_beyond_the_text_base():
    now = space()
    assert now.new_rows(20).tolist() == list(range(20, now.size))
    assert now.new_rows(24).tolist() == list(range(20, now.size))  # padding rows are new too
    assert now.new_rows(15).tolist() == list(range(15, now.size))
    with pytest.raises(TokenSpaceError, match="base_rows"):
        now.new_rows(-1)


def test_allowed_rows():
    now = space(GROUPS, CODECS[:2])
    now = space([g for g in GROUPS if g.name != "ecg/leads"], CODECS, now)
    holes = [s.id for s in now.specials if s.removed]
    assert len(holes) == 2
    text = now.allowed()
    assert text.tolist() == [i < 20 for i in range(now.size)]
    some = now.allowed(specials=["control", "<|mark|>", "system_end"], codecs=["toy/a"])
    expected = {*range(20), now.id_of("mark"), now.id_of("system_end")}
    expected |= {s.id for s in now if s.group == "xoron-core/control"}
    for r in now.codebooks("toy/a"):
        expected |= set(range(r.start, r.stop))
    assert set(some.nonzero().flatten().tolist()) == expected
    every = now.allowed(specials=now.groups(), codecs=["toy/a", "toy/b:0"], rows=now.size + 9)
    assert len(every) == now.size + 9
    assert set((~every).nonzero().flatten().tolist()) == {
        *holes,
        *range(now.size, now.size + 9),
    }
    with pytest.raises(TokenSpaceError, match="rows"):
        now.allowed(rows=now.size - 1)
    with pytest.raises(TokenSpaceError, match=r"'<\|leed\|>'"):
        now.allowed(specials=["<|leed|>"])
    with pytest.raises(TokenSpaceError, match="'toy/c'"):
        now.allowed(codecs=["toy/c"])
    with pytest.raises(TokenSpaceError, match="several names"):
        now.allowed(specials="control")


@pytest.mark.parametrize("value", [-1, 5, 10**9])
def test_codes_out_of_range_are_refused_with_value_and_place(value):
    now = space()
    codes = torch.zeros(2, 3, dtype=torch.int64)
    assert now.to_global("toy/a:1", codes).unique().tolist() == [now.range("toy/a:1").start]
    codes[1, 2] = value
    with pytest.raises(TokenSpaceError, match=rf"id {value} at position \(1, 2\).*0 \.\. 4"):
        now.to_global("toy/a:1", codes)
    with pytest.raises(TokenSpaceError, match=rf"id {now.size} at position \(0,\)"):
        now.to_local(torch.tensor([now.size]))
    with pytest.raises(TokenSpaceError, match=r"integer tensor, got torch\.float32"):
        now.to_global("toy/a:1", torch.zeros(3))
    with pytest.raises(TokenSpaceError, match=r"Did you mean 'toy/a:1'"):
        now.to_global("toy/a_1", torch.zeros(3, dtype=torch.int64))


def test_what_contradicts_the_lock_is_refused_by_name():
    lock = space()
    with pytest.raises(TokenSpaceError, match=r"test/base.*identity was 'vocabulary' and is 'v'"):
        space(lock=lock, text=replace(TEXT, identity="v"))
    with pytest.raises(TokenSpaceError, match=r"gained \[\('<\|x\|>', 3\)\]"):
        space(lock=lock, text=replace(TEXT, owned={**TEXT.owned, "<|x|>": 3}))
    with pytest.raises(TokenSpaceError, match="no text base"):
        space(lock=lock, text=None)
    with pytest.raises(TokenSpaceError, match=r"'toy/b:0'.*size was 3 and is 4"):
        space(codecs=[*CODECS[:2], replace(CODECS[2], size=4)], lock=lock)
    with pytest.raises(TokenSpaceError, match=r"'toy/a:1'.*delay was 0 and is 1"):
        space(codecs=[CODECS[0], replace(CODECS[1], delay=1), CODECS[2]], lock=lock)
    swapped = [replace(CODECS[0], codebook=1), replace(CODECS[1], codebook=0), CODECS[2]]
    with pytest.raises(TokenSpaceError, match=r"equals 'toy/a:[01]': the codebooks are swapped"):
        space(codecs=swapped, lock=lock)
    other = TokenGroup("abc/first", {"mark": "<|other|>"})
    with pytest.raises(TokenSpaceError, match=r"'abc/first/mark' was '<\|mark\|>'"):
        space([other], lock=lock)
    # The same holds for what is a hole by now.
    hole = space([], [], lock)
    with pytest.raises(TokenSpaceError, match=r"'toy/b:0'.*rate"):
        space([], [replace(CODECS[2], rate=1.0)], hole)


def test_contributions_that_collide_are_refused_by_name():
    one = TokenGroup("abc/x", {"a": "<|same|>"})
    two = TokenGroup("abc/y", {"b": "<|same|>"})
    with pytest.raises(TokenSpaceError, match=r"'abc/x/a' and 'abc/y/b'.*'<\|same\|>'"):
        space([one, two])
    with pytest.raises(TokenSpaceError, match="'abc/x' is contributed twice"):
        space([one, one])
    with pytest.raises(TokenSpaceError, match="'toy/b:0' is requested twice"):
        space(codecs=[CODECS[2], CODECS[2]])
    with pytest.raises(TokenSpaceError, match=r"'toy/a'.*\[1\]; expected \[0\]"):
        space(codecs=[CODECS[1]])
    with pytest.raises(TokenSpaceError, match="lost earlier ones"):
        space(codecs=[CODECS[1]], lock=space(codecs=CODECS[:2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextBase("base", 3, "i"),
        lambda: TextBase("test/base", 0, "i"),
        lambda: TextBase("test/base", True, "i"),
        lambda: TextBase("test/base", 3, ""),
        lambda: TextBase("test/base", 3, "i", {"<|x|>": 3}),
        lambda: TextBase("test/base", 3, "i", {"<|x|>": 1, "<|y|>": 1}),
        lambda: CodecRange("toy/a:0", 0, 5, "i", None, "signal"),
        lambda: CodecRange("toy/a", -1, 5, "i", None, "signal"),
        lambda: CodecRange("toy/a", 0, 0, "i", None, "signal"),
        lambda: CodecRange("toy/a", 0, -5, "i", None, "signal"),
        lambda: CodecRange("toy/a", 0, 5, "", None, "signal"),
        lambda: CodecRange("toy/a", 0, 5, "i", 0.0, "signal"),
        lambda: CodecRange("toy/a", 0, 5, "i", float("nan"), "signal"),
        lambda: CodecRange("toy/a", 0, 5, "i", None, "signal", delay=1),
        lambda: CodecRange("toy/a", 1, 5, "i", None, "signal", delay=-1),
        lambda: space([TokenGroup("nogroup", {"a": "<|a|>"})]),
        lambda: space([TokenGroup("abc/x", {"a": ""})]),
        lambda: space([TokenGroup("abc/x", {"a": " x"})]),
        lambda: space([TokenGroup("abc/x", {"a": '"x"'})]),
    ],
)
def test_entries_that_cannot_be_are_refused(make):
    with pytest.raises(TokenSpaceError):
        make()


def test_overlap_gap_and_swapped_codebooks_are_refused_by_name():
    now = space()
    specials, codecs = list(now.specials), list(now.codecs)
    moved = [replace(s, id=s.id + 1) if s.key == "abc/first/mark" else s for s in specials]
    with pytest.raises(TokenSpaceError, match=r"ids 45 to 45, between .*redacted.* and .*mark'"):
        TokenSpace(TEXT, tuple(moved), now.codecs)
    gone = tuple(s for s in specials if s.key != "abc/first/mark")
    with pytest.raises(TokenSpaceError, match=r"belong to nothing.*named hole"):
        TokenSpace(TEXT, gone, now.codecs)
    first, second, third = codecs
    swapped = (replace(first, start=second.start), replace(second, start=first.start), third)
    with pytest.raises(TokenSpaceError, match=r"order \[1, 0\]"):
        TokenSpace(TEXT, now.specials, swapped)
    with pytest.raises(TokenSpaceError, match="overlaps codec range 'toy/a:1'"):
        TokenSpace(TEXT, now.specials, (first, second, replace(third, start=third.start - 1)))
    with pytest.raises(TokenSpaceError, match="must be an alias"):
        TokenSpace(TEXT, (Special("abc/x", "own", "<|own|>", 20),))
    with pytest.raises(TokenSpaceError, match=r"alias to id 13.*has id 12"):
        TokenSpace(TEXT, (Special("abc/x", "own", "<|own|>", 13, alias=True),))
    with pytest.raises(TokenSpaceError, match="stands twice"):
        TokenSpace(None, (Special("abc/x", "a", "a", 0), Special("abc/x", "a", "b", 1)))


def test_names_shared_by_two_groups_are_told_apart():
    two = [TokenGroup("abc/x", {"go": "<x>"}), TokenGroup("abd/y", {"go": "<y>", "bos": "<b>"})]
    now = space([*two, CORE["control"]])
    assert now.id_of("bos") == now.id_of("<|bos|>")
    assert now.tokens["abd/y/bos"] == "<b>"
    assert now.id_of("abd/y/bos") == now.id_of("<b>")
    with pytest.raises(TokenSpaceError, match="abc/x/go, abd/y/go"):
        now.id_of("go")
    with pytest.raises(TokenSpaceError, match="Did you mean 'eos'"):
        now.id_of("eoss")


def test_pairs_and_hidden_come_from_the_selected_groups():
    now = space()
    assert now.pairs()["<|lead|>"] == "<|/lead|>"
    assert now.pairs()["<|user|>"] == "<|/user|>"
    assert now.hidden["<|lead|>"] == "<|/lead|>"
    assert now.hidden["<|bos|>"] is None
    assert "<|think|>" not in now.hidden


def test_a_space_travels_to_a_worker_without_its_caches():
    now = space()
    now.to_local(torch.tensor([1]))
    copy = pickle.loads(pickle.dumps(now))  # noqa: S301
    assert copy == now
    assert copy.hash == now.hash
    assert set(copy.__getstate__()) == {"text", "specials", "codecs"}


def test_a_space_of_codecs_alone():
    now = space([], CODECS, text=None)
    assert (now.size, now.text_size) == (13, 0)
    assert now.codecs[0] == CodecEntry(CODECS[0], 0)
    assert now.allowed(codecs=["toy/b"]).nonzero().flatten().tolist() == [10, 11, 12]
