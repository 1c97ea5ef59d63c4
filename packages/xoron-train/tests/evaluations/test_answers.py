"""Proves the evaluation `answers` on a model made by hand, whose answers are known."""

from __future__ import annotations

import json

import pytest
import torch

from xoron_core.errors import ConfigError, DataError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import AnswersConfig, evaluate_answers
from xoron_train.evaluations.answers import Answers

SLOT = "word.encoder"


def test_right_answers_count_in_all_and_by_kind(speller, shows):
    samples = [
        shows("A", kind="vowel"),
        shows("E", kind="vowel"),
        shows("B", kind="other"),
        shows("C", answer="D", kind="other"),
        shows("F", answer="D", kind="other"),
    ]
    record = evaluate_answers(*speller(), samples)
    assert record["samples"] == 5
    assert record["score"] == pytest.approx(3 / 5)
    assert record["cut"] == 0
    # D is expected twice of three times; the two vowels once each.
    assert record["chance"] == pytest.approx(3 / 5)
    assert record["kinds"]["vowel"] == {"samples": 2, "score": 1, "chance": 0.5}
    assert record["kinds"]["other"] == {
        "samples": 3,
        "score": pytest.approx(1 / 3),
        "chance": pytest.approx(2 / 3),
    }
    assert list(record["controls"]) == ["zeroed"]
    assert "passed" not in record
    json.dumps(record)


def test_case_folds_unless_exact(speller, shows):
    samples = [shows("A", answer=" a "), shows("B")]
    assert evaluate_answers(*speller(), samples)["score"] == 1
    assert evaluate_answers(*speller(), samples, score="exact")["score"] == 0.5


def test_references_stand_for_the_answer(speller, shows):
    samples = [
        shows("B", answer="X", references=["A", "B"]),
        shows("C", references=["A", "D"]),
    ]
    assert evaluate_answers(*speller(), samples)["score"] == 0.5


def test_vqa_consensus(speller, shows):
    people = ["B", "b.", "the B", *["C"] * 7]
    samples = [shows("B", references=people), shows("D", references=people)]
    record = evaluate_answers(*speller(), samples, score="vqa")
    assert record["score"] == pytest.approx((0.9 + 0) / 2)
    assert record["chance"] == 1


def test_controls_take_away_what_is_seen_and_nothing_else(speller, shows):
    samples = [shows(letter) for letter in "ABCDEFG"] + [shows([], answer="Y")]
    controls = ("zeroed", "shuffled", "noised")
    record = evaluate_answers(*speller(), samples, controls=controls)
    assert record["score"] == pytest.approx(7 / 8)
    for name in controls:
        assert record["controls"][name]["samples"] == 7
        assert record["controls"][name]["score"] <= 1 / 7  # noise may hit by chance
    blind = evaluate_answers(*speller(gain=0), samples, controls=controls)
    assert blind["score"] == 0


def test_shuffled_answers_are_those_to_the_others_media(speller, shows):
    # Every word is shown beside the answer to another one: with two words, all shuffled are right.
    samples = [shows("A", answer="B"), shows("B", answer="A")]
    record = evaluate_answers(*speller(), samples, controls=["shuffled"])
    assert record["score"] == 0
    assert record["controls"]["shuffled"]["score"] == 1


def test_media_go_to_questions_with_another_answer(speller, shows):
    people = [["C", "C", "D"], ["D", "C", "C"], ["D", "D", "C"], ["d", "D", "E"]]
    words = ["CX", "CY", "DX", "DY"]
    samples = [shows(w, references=known) for w, known in zip(words, people, strict=True)]
    record = evaluate_answers(*speller(), samples, controls=["shuffled"])
    assert record["score"] == 1
    # C is shown where most say D, and D where most say C; three people named both, one did not.
    assert record["controls"]["shuffled"] == {"samples": 4, "score": 0.75}


def test_the_batch_size_does_not_matter(speller, shows):
    words = ["A", "BC", "DEF", "GH", "IJK", "L", "MN"]
    samples = [shows(word, kind=str(len(word))) for word in words] + [shows([], answer="A")]
    first, *others = (
        evaluate_answers(
            *speller(), samples, controls=["zeroed", "shuffled", "noised"], batch_size=size
        )
        for size in (1, 3, 64)
    )
    assert all(other == first for other in others)
    assert first["controls"]["shuffled"]["samples"] == 7


def test_answers_that_are_cut_are_counted(speller, shows):
    samples = [shows(letter) for letter in "ABC"]
    assert evaluate_answers(*speller(), samples, max_new_tokens=1)["cut"] == 3
    assert evaluate_answers(*speller(gain=0), samples, max_new_tokens=5)["cut"] == 3


def test_text_alone_has_no_control(speller, shows):
    samples = [shows([], answer="A"), shows([], answer="B")]
    assert evaluate_answers(*speller(), samples)["controls"] == {}
    with pytest.raises(DataError, match="'zeroed' finds nothing to replace in 2 conversations"):
        evaluate_answers(*speller(), samples, controls=["zeroed"])
    with pytest.raises(DataError, match="'shuffled' finds nothing to replace in 2 conversations"):
        evaluate_answers(*speller(), [shows("A"), shows("A")], controls=["shuffled"])


def test_wrong_samples_are_named(speller, shows):
    model, processor = speller()
    with pytest.raises(DataError, match="there are no conversations to judge"):
        evaluate_answers(model, processor, [])
    with pytest.raises(DataError, match="conversation 'silent': expected a prompt and then"):
        evaluate_answers(model, processor, [Conversation("silent", shows("A").messages[:1])])
    with pytest.raises(DataError, match="conversation 'broken': word: 'a' is no word"):
        evaluate_answers(model, processor, [Conversation("broken", shows("a").messages)])
    with pytest.raises(ConfigError, match=r"no encoder or codec in image.encoder"):
        evaluate_answers(model, processor, [shows("A")], slots=["image.encoder"])


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({}, None),
        ({"at_least": 0.75}, True),
        ({"at_least": 0.76}, False),
        ({"control_at_most": 0.0}, True),
        ({"at_least": 0.9, "control_at_most": 0.0}, False),
        ({"at_least": 0.7, "control_at_most": 0.2, "controls": ["shuffled"]}, False),
    ],
)
def test_gates(speller, shows, gates, passed):
    # Three of four answers are right; shuffled, one of them is: Q is shown where E was.
    samples = [shows("AB"), shows("CD"), shows("Q"), shows("E", references=["A", "Q"])]
    config = AnswersConfig.parse({"source": "words", **gates})
    record = Answers(config).run(*speller(), samples)
    assert record["score"] == 0.75
    assert record.get("passed") is passed


def test_gates_that_nothing_can_pass_are_refused(speller, shows):
    with pytest.raises(ConfigError, match="required: true needs a gate"):
        AnswersConfig.parse({"source": "words", "required": True})
    with pytest.raises(ConfigError, match="control_at_most needs a control"):
        AnswersConfig.parse({"source": "words", "control_at_most": 0.1, "controls": []})
    config = AnswersConfig.parse({"source": "words", "control_at_most": 0.1})
    with pytest.raises(DataError, match="control_at_most finds no control"):
        Answers(config).run(*speller(), [shows([])])


def test_mode_and_random_state_are_left_alone(speller, shows):
    model, processor = speller()
    model.train()
    random = torch.get_rng_state()
    evaluate_answers(model, processor, [shows("A"), shows("B")], controls=["shuffled", "noised"])
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.part(SLOT)._forward_hooks
    assert not model.part(SLOT)._forward_pre_hooks
