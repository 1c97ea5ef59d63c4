"""Masks and default positions say exactly what a slow loop over positions says.

Also: the fast path is taken only where no mask is needed, padding and foreign documents are never
seen, no row is left without a key, and a mask that does not cover the cache is refused.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.errors import SequenceError
from xoron_core.nn.masks import causal_mask, positions


def _slow_mask(length: int, past: int, keys: int, valid, documents) -> torch.Tensor:
    rows = next((len(t) for t in (valid, documents) if t is not None), 1)
    out = torch.zeros(rows, 1, length, keys, dtype=torch.bool)
    for b in range(rows):
        for n in range(length):
            for s in range(past + n + 1):
                seen = valid is None or bool(valid[b, s])
                if documents is not None:
                    seen = seen and documents[b, s] == documents[b, past + n] != 0
                out[b, 0, n, s] = seen or s == past + n
    return out


@st.composite
def _cases(draw):
    length, past, spare = draw(st.integers(1, 7)), draw(st.integers(0, 5)), draw(st.integers(0, 3))
    rows = draw(st.integers(1, 3))
    bits = st.lists(st.integers(0, 1), min_size=past + length, max_size=past + length)
    ids = st.lists(st.integers(0, 3), min_size=past + length, max_size=past + length)
    valid = torch.tensor([draw(bits) for _ in range(rows)]) if draw(st.booleans()) else None
    documents = None
    if draw(st.booleans()):
        documents = torch.tensor([sorted(draw(ids)) for _ in range(rows)])
    return length, past, past + length + spare, valid, documents


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_mask_equals_the_slow_one(case) -> None:
    length, past, keys, valid, documents = case
    expected = _slow_mask(length, past, keys, valid, documents)
    got = causal_mask(length, past=past, keys=keys, attention_mask=valid, document_ids=documents)
    if got is None:
        # No mask means: every query sees all keys up to its own.
        assert keys == past + length
        assert past == 0 or length == 1
        got = torch.ones(length, keys, dtype=torch.bool).tril(past)[None, None]
    assert torch.equal(got.expand_as(expected), expected)
    assert expected.any(-1).all()


@settings(max_examples=80, deadline=None)
@given(_cases())
def test_positions_equal_the_slow_ones(case) -> None:
    length, past, _, valid, documents = case
    got = positions(length, past=past, attention_mask=valid, document_ids=documents)
    for b in range(got.shape[0]):
        for n in range(length):
            at = past + n
            if documents is not None:
                start = at
                while start and documents[b, start - 1] == documents[b, at]:
                    start -= 1
                expected = at - start
            elif valid is not None:
                expected = max(int(valid[b, : at + 1].sum()) - 1, 0)
            else:
                expected = at
            assert got[b, n] == expected


def test_no_mask_is_made_where_none_is_needed() -> None:
    ones, same = torch.ones(2, 6), torch.full((2, 6), 3)
    assert causal_mask(6) is None
    assert causal_mask(6, attention_mask=ones, document_ids=same) is None
    assert causal_mask(1, past=5, attention_mask=ones) is None
    assert causal_mask(2, past=4, attention_mask=ones) is not None
    assert causal_mask(6, keys=8, attention_mask=ones) is not None
    assert causal_mask(6, document_ids=torch.zeros(2, 6, dtype=torch.long)) is not None


@pytest.mark.parametrize("name", ["attention_mask", "document_ids"])
def test_what_does_not_cover_the_cache_is_refused(name: str) -> None:
    with pytest.raises(SequenceError, match=rf"{name} has 3 columns, expected 8 \(5 cached"):
        causal_mask(3, past=5, **{name: torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(SequenceError, match="expected 8"):
        positions(3, past=5, **{name: torch.ones(1, 3, dtype=torch.long)})
