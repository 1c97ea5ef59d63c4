"""The memory of media is what a plain loop over items and positions would keep, and whatever is
done to the rows of a cache is done to it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from xoron_core.media_memory import (
    NEVER,
    MediaMemory,
    collect,
    columns,
    join,
    keep,
    recall,
    visible,
)

B, N, D = 3, 20, 4


@st.composite
def items(draw):
    """Spans of items that do not overlap, in any order over rows and within them."""
    spans = []
    for row in range(B):
        cuts = sorted(draw(st.sets(st.integers(0, N), max_size=6)))
        pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
        spans += [(row, begin, end - begin) for begin, end in pairs]
    return draw(st.permutations(spans)) if spans else [(1, 2, 3)]


@settings(max_examples=60, deadline=None)
@given(items(), st.integers(0, 7), st.booleans())
def test_every_position_sees_the_items_that_begin_before_or_at_it(spans, past, packed) -> None:
    embeds = torch.randn(B, N, D)
    documents = torch.sort(torch.randint(1, 4, (B, past + N)), dim=1).values if packed else None
    features, starts = collect(embeds, torch.tensor(spans), past)
    seen = visible(starts, past + torch.arange(N), document_ids=documents)
    for row in range(B):
        own = sorted(s for s in spans if s[0] == row)
        expected = [embeds[row, start : start + length] for _, start, length in own]
        count = sum(map(len, expected))
        assert torch.equal(features[row, :count], torch.cat([embeds[0, :0], *expected]))
        assert not features[row, count:].any()
        begins = [start for _, start, length in own for _ in range(length)]
        for n in range(N):
            looks = [
                start <= n
                and (
                    documents is None
                    or bool(documents[row, past + start] == documents[row, past + n])
                )
                for start in begins
            ]
            assert seen[row, n].tolist() == looks + [False] * (seen.shape[-1] - count)


def filled(rows: int, length: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(rows, 1, length, 2), torch.randn(rows, 1, length, 2), layer)
    return cache


@pytest.fixture
def cache() -> DynamicCache:
    """A cache of two rows and nine columns that remembers two items of the first row."""
    found = filled(2, 9)
    starts = torch.tensor([[1, 1, 6], [NEVER, NEVER, NEVER]])
    keep(found, MediaMemory(starts, (torch.arange(6.0).view(2, 3, 1),)))
    return found


def test_it_follows_the_rows_of_its_cache(cache) -> None:
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        before, after = recall(cache), recall(changed)
        assert torch.equal(after.starts, before.starts[rows])
        assert torch.equal(after.states[0], before.states[0][rows])
        assert changed.get_seq_length() == columns(cache) == 9
    cache.reset()
    assert recall(cache) is None


def test_cropping_forgets_what_began_behind_the_end(cache) -> None:
    kept = copy.deepcopy(cache)
    kept.crop(-3)
    assert recall(kept).starts.tolist() == [[1, 1, NEVER], [NEVER] * 3]
    assert recall(cache).starts.tolist()[0] == [1, 1, 6], "a copy counts its own columns"


def test_a_cache_remembers_once_and_more_is_joined(cache) -> None:
    assert recall(None) is recall(DynamicCache()) is recall(filled(1, 3)) is None
    old = recall(cache)
    new = MediaMemory(torch.tensor([[9], [12]]), (torch.full((2, 1, 1), 7.0),))
    both = join(old, new)
    assert both.starts.tolist() == [[1, 1, 6, 9], [NEVER, NEVER, NEVER, 12]]
    assert both.states[0][..., 0].tolist() == [[0, 1, 2, 7], [3, 4, 5, 7]]
    layers = len(cache.layers)
    keep(cache, both)
    assert len(cache.layers) == layers
    assert recall(cache) is both
