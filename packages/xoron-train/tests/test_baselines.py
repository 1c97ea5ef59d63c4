"""Proves the byte baselines against a direct implementation and a closed form."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_train import baselines
from xoron_train.baselines import ByteModel

texts = st.lists(st.binary(max_size=40), min_size=1, max_size=6)


def direct(order: int, fitted: list[bytes], scored: list[bytes]) -> float:
    """Witten-Bell by dictionaries, one byte at a time."""
    counts: dict[bytes, Counter[int]] = {}
    for text in fitted:
        padded = b"\0" * order + text
        for index in range(order, len(padded)):
            for length in range(order + 1):
                context = padded[index - length : index]
                counts.setdefault(context, Counter())[padded[index]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = counts.get(context, Counter())
        if not seen:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    nats, size = 0.0, 0
    for text in scored:
        padded = b"\0" * order + text
        for index in range(order, len(padded)):
            nats -= math.log(probability(padded[index - order : index], padded[index]))
            size += 1
    return nats / size / math.log(2)


@pytest.mark.parametrize("order", [0, 1, 2])
@settings(deadline=None, max_examples=15)  # each example sums over a table of 128 MB
@given(data=st.data())
def test_it_equals_the_direct_implementation(order: int, data: st.DataObject) -> None:
    if order == 2:
        # Few bytes, so that contexts repeat; order 2's table is filled only rarely.
        strategy = st.lists(st.text("ab\0", max_size=30).map(str.encode), min_size=1, max_size=4)
    else:
        strategy = texts
    fitted, scored = data.draw(strategy), data.draw(strategy)
    scored.append(b"a")
    expected = direct(order, fitted, scored)
    assert ByteModel(order).fit(fitted).bits_per_byte(scored) == pytest.approx(expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, scored = [b"abcab" * 20, b"cab", b""], [b"abc" * 9, b"bca"]
    whole = ByteModel(1).fit(fitted).bits_per_byte(scored)
    monkeypatch.setattr(baselines, "_CHUNK", 4)
    assert ByteModel(1).fit(fitted).bits_per_byte(scored) == pytest.approx(whole)


def test_probabilities_of_the_next_byte_sum_to_one() -> None:
    model = ByteModel(1).fit([b"hello there"])
    for context in (b"e", b"q"):
        # p(c | context) as the ratio of two documents' probabilities.
        alone = model.bits_per_byte([context])
        total = sum(
            2.0 ** (alone - 2 * model.bits_per_byte([context + bytes([byte])]))
            for byte in range(256)
        )
        assert total == pytest.approx(1.0)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bytes"):
        ByteModel(0).fit([b"a"]).bits_per_byte([b""])
    with pytest.raises(ValueError, match="order"):
        ByteModel(3)
