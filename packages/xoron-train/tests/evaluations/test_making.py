"""Proves the evaluation `making`: what a model made by hand makes is judged right, and each fault
that is put in on purpose is found and counted once: an id out of range, a span that is not ended, a
medium that does not decode, one of numbers that are not finite.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from xoron_core.errors import ConfigError, DataError
from xoron_core.grammar import Grammar
from xoron_core.sampling import Sampling
from xoron_train.conversation import Conversation
from xoron_train.evaluations import evaluate_making
from xoron_train.evaluations.config import MakingConfig
from xoron_train.evaluations.made_answers import Maker
from xoron_train.evaluations.making import Making

HOT = Sampling(temperature=30.0, seed=1, vary_rows=True)


def asked(makes, letters="abcdefgh"):
    return [makes(letter, "A") for letter in letters]


def test_what_is_made_is_legal_and_decodes(coder, makes, shows):
    samples = [*asked(makes), shows("B"), shows("C")]
    record = evaluate_making(*coder(), samples, max_new_tokens=6, batch_size=3)
    assert record["samples"] == 10
    assert record["made"] == {"word": 8, "text": 2}
    assert (record["out_of_range"], record["decoded"]) == (0, 1)
    # A letter and the end marker each, which the model holds for the best of all ids.
    assert (record["ids"], record["unguided"]) == (16, 0)
    assert record["faults"] == []


def test_what_the_model_would_do_without_the_grammar_is_said(coder, makes):
    """It listens to nothing: its best id for the letter is id 0, which is text."""
    record = evaluate_making(*coder(asked=0.0), asked(makes), max_new_tokens=4)
    assert (record["ids"], record["unguided"]) == (16, 0.5)
    assert (record["out_of_range"], record["decoded"]) == (0, 1)


def test_sampled_answers_are_legal_too_and_differ(coder, makes, monkeypatch):
    model, processor = coder()
    found = []
    examine = Maker._examine

    def kept(self, answer):
        found.append(answer)
        examine(self, answer)

    monkeypatch.setattr(Maker, "_examine", kept)
    record = evaluate_making(model, processor, asked(makes), sampling=HOT, batch_size=3)
    assert (record["out_of_range"], record["decoded"]) == (0, 1)
    words = {tuple(map(float, medium)) for answer in found for medium in answer.media}
    assert len(words) > 6
    assert len({len(word) for word in words}) > 1
    found.clear()
    evaluate_making(model, processor, asked(makes), frames={"word": 3}, sampling=HOT)
    assert {len(medium) for answer in found for medium in answer.media} == {3}
    with pytest.raises(ConfigError, match="makes 1 to 3 frames, got 4"):
        evaluate_making(model, processor, asked(makes), frames={"word": 4})


def test_a_grammar_that_lets_anything_begin_a_medium_is_found_out(coder, makes, monkeypatch):
    allowed = Grammar.allowed

    def careless(self, state):
        every = torch.ones(self.space.size, dtype=torch.bool)
        first = state.slot is not None and state.step == 0
        return every if first else allowed(self, state)

    model, processor = coder(asked=0.0)
    monkeypatch.setattr(Grammar, "allowed", careless)
    record = evaluate_making(model, processor, asked(makes), max_new_tokens=4)
    assert record["out_of_range"] == 1
    assert record["decoded"] == 0


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda ids, space: [ids[0], ord("x"), *ids[2:]], "expected an id of xoron-letters"),
        (lambda ids, space: ids[:2], "the end of the sequence"),
        (lambda ids, space: [space.id_of("<|user|>"), *ids], "no text of an answer may hold"),
        (lambda ids, space: [*ids, space.size], "position"),
    ],
    ids=["foreign", "cut", "special", "outside"],
)
def test_each_broken_answer_is_counted(coder, makes, monkeypatch, break_it, words):
    model, processor = coder()
    collect = Maker._collect

    def broken(self, samples, events):
        answers = collect(self, samples, events)
        for answer in answers:
            if answer.sample == "c-A":
                answer.ids = break_it(answer.ids, processor.space)
        return answers

    monkeypatch.setattr(Maker, "_collect", broken)
    monkeypatch.setattr(Maker, "_ask_alone", lambda *_: None)
    record = evaluate_making(model, processor, asked(makes), max_new_tokens=4)
    assert record["out_of_range"] == 1 / 8
    assert len(record["faults"]) == 1
    assert record["faults"][0].startswith("c-A: ")
    assert words in record["faults"][0]


class Recording(NamedTuple):
    samples: np.ndarray
    rate: int


NAN = torch.tensor([float("nan")])


@pytest.mark.parametrize(
    "broken",
    [None, NAN, [Recording(NAN.numpy(), 8000)], Recording(np.zeros((1, 0)), 8000)],
    ids=["raised", "tensor", "array inside", "nothing inside"],
)
def test_what_does_not_decode_is_counted(coder, makes, monkeypatch, broken):
    model, processor = coder()
    codec = type(model.part("word.codec"))
    decode = codec.decode

    def some(self, ids, metadata):
        if int(ids[0, 0, 0]) != 2:  # every word but C
            return decode(self, ids, metadata)
        if broken is None:
            raise DataError("no such letter")
        return broken

    monkeypatch.setattr(codec, "decode", some)
    record = evaluate_making(model, processor, asked(makes), max_new_tokens=4, batch_size=4)
    assert record["decoded"] == 7 / 8
    assert record["out_of_range"] == 0
    expected = "no such letter" if broken is None else "not finite"
    assert record["faults"][0].startswith("c-A: ")
    assert expected in record["faults"][0]


def test_thresholds_decide_and_mistakes_are_said(coder, makes, shows):
    config = MakingConfig.parse({"source": "words", "unguided_at_most": 0.4, "temperature": 0})
    evaluation = Making(config)
    record = evaluation.run(*coder(asked=0.0), asked(makes))
    assert [check.passed for check in evaluation.checks(record)] == [True, True, False]
    assert record["passed"] is False
    assert Making(MakingConfig.parse({"source": "words"})).run(*coder(), asked(makes))["passed"]
    with pytest.raises(DataError, match="'decoded' is about media, and no conversation"):
        evaluation.run(*coder(), [shows("A")])
    with pytest.raises(DataError, match="expected a prompt and then"):
        evaluate_making(*coder(), [Conversation("alone", shows("A").messages[:1])])
    with pytest.raises(DataError, match="no conversations to judge"):
        evaluate_making(*coder(), [])
