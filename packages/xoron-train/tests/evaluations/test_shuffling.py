"""Proves who gets whose media: nobody her own, nobody a longer one, as many as can be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_train.evaluations.shuffling import Medium, Place, donors, groups

MEDIA = st.builds(
    Medium,
    st.sampled_from(["image.encoder", "audio.encoder"]),
    st.integers(1, 2),
    st.text("abcdef", min_size=1, max_size=1),
)
SAMPLES = st.lists(st.lists(MEDIA, max_size=3), max_size=12)


def media(*contents, length=4, slot="image.encoder"):
    return [[Medium(slot, length, content)] for content in contents]


def shuffled(samples, seed=0, expected=None):
    expected = range(len(samples)) if expected is None else expected
    return donors(samples, group=groups(samples), expected=expected, seed=seed)


@given(samples=SAMPLES, answers=st.text("xyz", min_size=12, max_size=12), seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_medium_goes_to_a_stranger_where_it_fits_and_is_given_once(samples, answers, seed):
    taken = shuffled(samples, seed, answers)
    assert len(taken) == len(samples)
    given_away = Counter()
    for index, (sample, places) in enumerate(zip(samples, taken, strict=True)):
        if places is None:
            continue
        assert len(places) == len(sample)
        own = {(medium.slot, medium.content) for medium in sample}
        for medium, place in zip(sample, places, strict=True):
            donor = samples[place.sample][place.medium]
            assert (donor.slot, donor.length) == (medium.slot, medium.length)
            assert answers[place.sample] != answers[index]
            assert not own & {(other.slot, other.content) for other in samples[place.sample]}
            given_away[place] += 1
    assert max(given_away.values(), default=1) == 1


@given(st.lists(st.text("abc", min_size=1, max_size=1), min_size=1, max_size=14), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_no_more_stay_behind_than_must(names, seed):
    must = max(0, 2 * max(Counter(names).values()) - len(names))
    same_media = shuffled(media(*names), seed)
    assert same_media.count(None) == must
    same_answers = shuffled(media(*map(str, range(len(names)))), seed, names)
    assert same_answers.count(None) == must


def test_samples_that_share_media_with_a_third_one_are_one_group():
    samples = [
        [Medium("s", 1, "a"), Medium("s", 1, "b")],
        [Medium("s", 1, "b"), Medium("s", 1, "c")],
        [Medium("s", 1, "c")],
        [Medium("s", 1, "d")],
        [],
        [Medium("other", 1, "a")],
    ]
    first, second, third, fourth, none, other = groups(samples)
    assert first == second == third
    assert len({first, fourth, none, other}) == 4


def test_a_sample_one_of_whose_media_fits_nowhere_is_left_out_whole():
    samples = [
        *media("a", "b", "c"),
        [Medium("image.encoder", 4, "d"), Medium("image.encoder", 9, "e")],
    ]
    taken = shuffled(samples)
    assert taken[3] is None
    assert None not in taken[:3]


@pytest.mark.parametrize("seed", range(5))
def test_the_seed_decides(seed):
    samples = media(*"abcdefgh")
    assert shuffled(samples, seed) == shuffled(samples, seed)
    assert any(shuffled(samples, seed) != shuffled(samples, other) for other in range(5, 10))


def test_two_samples_swap():
    assert shuffled(media("a", "b")) == [[Place(1, 0)], [Place(0, 0)]]
