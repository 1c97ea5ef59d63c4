"""Proves the order of codes in a sequence: it is the one of the definition, flattening and reading
back are inverse for any delays, and what the automaton lets follow is exactly what reading accepts.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.errors import SequenceError, TokenSpaceError
from xoron_core.flattening import CodeLayout
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_core.values import Codes

TEXT = TextBase("test/base", 7, "vocabulary")
SIZE = 5
DELAYS = st.lists(st.integers(0, 4), max_size=3).map(lambda later: (0, *later))


def layout(delays: tuple[int, ...]) -> CodeLayout:
    codecs = [
        CodecRange("toy/codec", q, SIZE + q, "codes", None, "signal", delay)
        for q, delay in enumerate(delays)
    ]
    space = TokenSpace.allocate(text=TEXT, groups=[], codecs=codecs)
    return CodeLayout(space, [codec.full_name for codec in codecs])


def batch(lengths: list[int], books: int, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZE, (len(lengths), max(lengths), books), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Codes(ids.masked_fill(~mask[..., None], -1), mask, [{} for _ in lengths])


def by_definition(codes: torch.Tensor, of: CodeLayout) -> list[int]:
    """Step by step: of each codebook the frame that its delay says, if there is one."""
    frames = len(codes)
    return [
        of.ranges[q].start + int(codes[step - delay, q])
        for step in range(frames + max(of.delays))
        for q, delay in enumerate(of.delays)
        if 0 <= step - delay < frames
    ]


@given(DELAYS, st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 99))
@settings(deadline=None)
def test_flattening_follows_the_definition_and_reading_back_undoes_it(delays, lengths, seed):
    of, codes = layout(delays), batch(lengths, len(delays), seed)
    flat = of.flatten(codes)
    rows = [codes.ids[item, :length] for item, length in enumerate(lengths)]
    assert flat.tolist() == [number for row in rows for number in by_definition(row, of)]
    for row, ids in zip(rows, flat.split([n * len(delays) for n in lengths]), strict=True):
        assert torch.equal(of.unflatten(ids), row)


def test_the_delay_pattern_of_musicgen():
    of = layout((0, 1, 2, 3))
    books = (of.order(4) % 4).tolist()
    assert books == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 2, 3, 3]
    assert (of.order(4) // 4).tolist() == [0, 1, 0, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 3, 2, 3]
    assert layout((0, 0)).order(3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limits", [(1, None), (1, 3), (2, 3), (2, 2)])
@pytest.mark.parametrize("delays", [(0,), (0, 0), (0, 1), (0, 2), (0, 2, 1), (0, 1, 1)])
def test_what_may_follow_is_what_is_read_over_all_short_rows(delays, limits):
    """Every row of codebooks of up to 6 ids, against the set of all whole bodies."""
    of = layout(delays)
    books = range(len(delays))
    most = limits[1] or 7
    whole = {tuple((of.order(t) % len(delays)).tolist()) for t in range(limits[0], most + 1)}
    for row in itertools.chain.from_iterable(
        itertools.product(books, repeat=n) for n in range(1, 7)
    ):
        place, frames = 0, None
        while place < len(row):
            follow = of.follow(place, frames, limits=limits)
            assert set(follow.codebooks) == {
                b[place] for b in whole if b[:place] == row[:place] and len(b) > place
            }
            assert follow.end == (row[:place] in whole)
            if row[place] not in follow.codebooks:
                break
            frames = of.frames_after(place, frames, token=of.ranges[row[place]].start)
            place += 1
        ids = torch.tensor([of.ranges[q].start for q in row])
        assert of.read(ids, limits=limits) == (place, of.follow(place, frames, limits=limits))


@pytest.mark.parametrize(
    ("delays", "books", "place", "expected"),
    [
        ((0, 0), [0, 1, 0], 3, "codec:1, got its end"),
        ((0, 0), [0, 0], 1, "codec:1, got id"),
        ((0, 0), [0, 1, 1], 2, "codec:0 or its end, got id"),
        ((0, 0), [], 0, "codec:0, got its end"),
        ((0, 1), [0, 0, 1], 3, "codec:0 or an id of toy/codec:1, got its end"),
        ((0, 1), [0, 1, 0], 2, "expected its end, got id"),
        ((0, 2), [0, 0, 1, 1, 0], 4, "expected its end, got id"),
    ],
)
def test_what_is_no_body_is_refused_with_its_place(delays, books, place, expected):
    of = layout(delays)
    ids = torch.tensor([of.ranges[q].start for q in books], dtype=torch.int64)
    with pytest.raises(SequenceError, match=rf"place {place} .*{expected}"):
        of.unflatten(ids)


def test_a_code_outside_its_codebook_and_an_id_of_something_else_are_refused():
    of, codes = layout((0, 1)), batch([2], 2)
    codes.ids[0, 1, 0] = SIZE
    with pytest.raises(TokenSpaceError, match=r"id 5 .*toy/codec:0"):
        of.flatten(codes)
    with pytest.raises(SequenceError, match="place 1"):
        of.unflatten(torch.tensor([of.ranges[0].start, 0]))
    with pytest.raises(TokenSpaceError, match="no codec range toy/other:0"):
        CodeLayout(of.space, ["toy/other:0"])
