"""Proves confidence and calibration against closed forms and an independent numpy computation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xoron_core.confidence import answer_confidence, calibration
from xoron_core.errors import DataError

PAIRS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def test_confidence_is_the_geometric_mean_probability():
    probabilities = [0.5, 0.25, 0.9]
    got = answer_confidence([math.log(p) for p in probabilities])
    assert got == pytest.approx(np.prod(probabilities) ** (1 / 3))
    assert answer_confidence([]) is None


@given(st.floats(0, 1), st.integers(0, 20), st.integers(1, 20))
def test_equal_confidences_are_off_by_their_distance_from_the_accuracy(confidence, right, wrong):
    pairs = [(confidence, True)] * right + [(confidence, False)] * wrong
    accuracy = right / (right + wrong)
    report = calibration(pairs)
    assert report.ece == pytest.approx(abs(confidence - accuracy), abs=1e-9)
    assert report.max_error == pytest.approx(report.ece, abs=1e-9)
    brier = accuracy * (confidence - 1) ** 2 + (1 - accuracy) * confidence**2
    assert report.brier == pytest.approx(brier, abs=1e-9)


@given(PAIRS, st.integers(1, 15))
def test_the_report_equals_numpy(pairs, bins):
    confidence = np.array([c for c, _ in pairs])
    correct = np.array([float(right) for _, right in pairs])
    edges = np.array([i / bins for i in range(1, bins)])
    where = np.digitize(confidence, edges, right=True)
    gaps = [
        (abs(confidence[where == b].mean() - correct[where == b].mean()), (where == b).mean())
        for b in range(bins)
        if (where == b).any()
    ]
    report = calibration(pairs, bins=bins)
    assert report.ece == pytest.approx(sum(gap * share for gap, share in gaps), abs=1e-9)
    assert report.max_error == pytest.approx(max(gap for gap, _ in gaps), abs=1e-9)
    assert [b.count for b in report.bins] == np.bincount(where, minlength=bins).tolist()
    assert sum(b.count for b in report.bins) == report.count == len(pairs)
    assert report.accuracy == pytest.approx(correct.mean())
    assert all(b.low <= b.confidence <= b.high for b in report.bins if b.count)


def test_perfect_calibration_has_no_error_and_overconfidence_has_all_of_it():
    perfect = [(0.25, k < 1) for k in range(4)] + [(0.75, k < 3) for k in range(4)]
    assert calibration(perfect).ece == pytest.approx(0, abs=1e-12)
    assert calibration([(1.0, False)] * 5).ece == 1
    assert calibration([(1.0, True), (0.0, False)]).ece == 0


def test_the_table_shows_every_bin_that_holds_answers():
    text = calibration([(0.05, False), (0.95, True), (0.93, True)]).table()
    assert len(text.splitlines()) == 5
    assert "(0.90, 1.00]" in text
    assert "expected calibration error 0.0567" in text


@pytest.mark.parametrize(
    ("pairs", "options", "words"),
    [([], {}, "no .* pairs"), ([(1.2, True)], {}, "1.2"), ([(0.5, True)], {"bins": 0}, "bins 0"),
     ([(float("nan"), True)], {}, "nan")],
)  # fmt: skip
def test_what_is_no_probability_is_refused(pairs, options, words):
    with pytest.raises(DataError, match=words):
        calibration(pairs, **options)
