"""Proves that orders are permutations fixed for all time, and that the split follows content
alone."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from xoron_train.data.order import held_out, permutation


@given(st.integers(0, 300), st.integers(0, 2**31), st.integers(0, 5))
def test_every_index_comes_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed, "source", epoch).tolist()) == list(range(size))


def test_the_order_is_that_of_splitmix64_on_every_machine() -> None:
    mask = (1 << 64) - 1
    digest = hashlib.blake2b(repr((7, "words", 2)).encode(), digest_size=8).digest()
    values = []
    for index in range(100):
        z = (int.from_bytes(digest, "little") + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(z ^ (z >> 31))
    expected = sorted(range(100), key=values.__getitem__)
    assert permutation(100, 7, "words", 2).tolist() == expected
    # Frozen: a change here would make every interrupted run resume into another order.
    assert expected[:5] == [1, 42, 55, 12, 68]


def test_seed_epoch_and_source_each_change_the_order() -> None:
    base = permutation(50, 0, "a", 0).tolist()
    for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert permutation(50, *key).tolist() != base


def test_the_held_out_share_is_the_fraction_and_grows_with_it() -> None:
    texts = [f"document {number}" for number in range(4000)]
    small = {text for text in texts if held_out(text, 0.1)}
    large = {text for text in texts if held_out(text, 0.3)}
    assert 0.08 < len(small) / len(texts) < 0.12
    assert 0.27 < len(large) / len(texts) < 0.33
    assert small < large
    assert not any(held_out(text, 0.0) for text in texts)
