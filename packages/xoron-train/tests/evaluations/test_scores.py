"""Proves scores against hand-computed ones: matches, chance by kind, the published VQA accuracy."""

from __future__ import annotations

import pytest

from xoron_core.errors import DataError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import vqa_accuracy
from xoron_train.evaluations.scores import SCORES, Expected, figures, most_frequent, split
from xoron_train.evaluations.vqa import normalise


def expected(*entries):
    return [Expected(f"c{i}", kind, list(known)) for i, (kind, *known) in enumerate(entries)]


@pytest.mark.parametrize(
    ("people", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_answers(people, accuracy):
    # 3 of 10 agree: leaving one of them out leaves 2 (2/3), leaving another out 3 (1):
    # (3 * 2/3 + 7 * 1) / 10 = 0.9
    others = [f"other {i}" for i in range(10 - people)]
    assert vqa_accuracy("red", ["red"] * people + others) == pytest.approx(accuracy)


def test_vqa_accuracy_needs_references():
    assert vqa_accuracy("red", ["red"] * 4) == 1
    with pytest.raises(DataError, match=r"needs 4 references or more .* got 3"):
        vqa_accuracy("red", ["red"] * 3)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Red  ball.", "red ball"),
        ("a dog, an owl", "dog owl"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("1,000", "1000"),
        ("well-known", "well known"),  # a mark between letters becomes a space
        ("well-known 1,000", "wellknown 1000"),  # unless there is a number with a comma
        ("yes !", "yes"),
        ("10:30", "10:30"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("its", "its"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),  # so in the authors' table
        ("line\none\ttwo", "line 1 2"),
    ],
)
def test_vqa_normalisation(answer, same):
    assert normalise(answer) == same


def test_match_folds_case_and_white_space_and_exact_does_not():
    match, exact = SCORES["match"], SCORES["exact"]
    assert match.worth(" Two  red\nballs ", ["two red balls"]) == 1
    assert match.worth("two red ball", ["two red balls"]) == 0
    assert match.worth("STRASSE", ["stra\u00dfe"]) == 1
    assert exact.worth("Two", ["two"]) == 0
    assert exact.worth("two", ["one", "two"]) == 1


def test_figures_by_kind():
    wanted = expected(("count", "1"), ("count", "2"), ("colour", "red"), ("", "x"))
    record = figures(["1", "1", "RED", "y"], wanted, SCORES["match"])
    assert record == {
        "samples": 4,
        "score": 0.5,
        "kinds": {
            "": {"samples": 1, "score": 0.0},
            "colour": {"samples": 1, "score": 1.0},
            "count": {"samples": 2, "score": 0.5},
        },
    }
    assert "kinds" not in figures(["x"], expected(("", "x")), SCORES["match"])


def test_chance_is_the_most_frequent_answer_of_each_kind():
    wanted = expected(
        ("count", "1"), ("count", "2"), ("count", " 2"), ("colour", "red"), ("colour", "RED")
    )
    assert most_frequent(wanted, SCORES["match"]) == ["2", "2", "2", "red", "red"]
    # Exactly compared, all answers of a kind differ, so each is right once.
    said = most_frequent(wanted, SCORES["exact"])
    assert figures(said, wanted, SCORES["exact"])["kinds"] == {
        "colour": {"samples": 2, "score": 0.5},
        "count": {"samples": 3, "score": pytest.approx(1 / 3)},
    }


def test_too_few_references_are_reported_with_the_conversation():
    with pytest.raises(DataError, match=r"conversation 'c0': VQA accuracy needs .* score: match"):
        figures(["x"], expected(("", "x")), SCORES["vqa"])


def talk(*messages):
    return Conversation("talk", [{"role": role, **rest} for role, rest in messages], "k")


ASK = ("user", {"content": "which?"})


def test_the_last_message_is_what_is_expected():
    parts = [{"type": "text", "text": "two"}, " balls"]
    for content, references, wanted in [
        ("two", None, ["two"]),
        (parts, None, ["two balls"]),
        ("two", ["two", "a pair"], ["two", "a pair"]),
        (None, ["two"], ["two"]),
    ]:
        sample = talk(ASK, ("assistant", {"content": content, "references": references}))
        prompt, found = split(sample)
        assert prompt == [{"role": "user", "content": "which?"}]
        assert found == Expected("talk", "k", wanted)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [ASK],
        [("assistant", {"content": "two"})],
        [ASK, ("assistant", {"content": " "})],
        [ASK, ("assistant", {"content": [{"type": "image", "image": "a.png"}]})],
        [ASK, ("assistant", {"content": "two", "references": "two"})],
        [ASK, ("assistant", {"content": "two", "references": [2]})],
        [ASK, ("assistant", {"content": "two"}), ASK],
    ],
)
def test_a_conversation_that_expects_no_text_is_named(messages):
    with pytest.raises(DataError, match="conversation 'talk': expected a prompt and then"):
        split(talk(*messages))
