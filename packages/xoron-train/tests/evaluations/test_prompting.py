"""Proves the evaluation `prompting` on a model made by hand, whose losses on made words are known.

A model that makes what it is asked for passes, one that listens to nothing shows no difference, one
that does the opposite is caught; the text beside the media does not count, neither do batch sizes.
"""

from __future__ import annotations

import math

import pytest

from xoron_core.errors import DataError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import Gate, evaluate_prompting
from xoron_train.evaluations.config import PromptingConfig
from xoron_train.evaluations.prompting import Prompting


def asked(makes, letters="ABCDEF"):
    return [makes(letter.lower(), letter) for letter in letters]


def test_a_model_that_makes_what_it_is_asked_for_passes(coder, makes):
    model, processor = coder()
    record = evaluate_prompting(model, processor, asked(makes), gate=Gate())
    # One id of a word of one letter is learned: the code, against every other row.
    rows = processor.space.size
    assert record["loss"] == pytest.approx(math.log(rows - 1 + math.e**8) - 8, abs=1e-5)
    assert record["shuffled"]["delta"] == pytest.approx(8, abs=1e-5)
    assert record["shuffled"]["wins"] == 1
    assert record["shuffled"]["samples"] == record["samples"] == 6
    assert record["passed"]


@pytest.mark.parametrize(("gain", "delta", "wins"), [(0.0, 0.0, 0.5), (-8.0, -8.0, 0.0)])
def test_one_that_does_not_listen_or_does_the_opposite_fails(coder, makes, gain, delta, wins):
    record = evaluate_prompting(*coder(asked=gain), asked(makes), gate=Gate(delta=0.0))
    assert record["shuffled"]["delta"] == pytest.approx(delta, abs=1e-5)
    assert record["shuffled"]["wins"] == wins
    assert record["passed"] is False


def test_text_beside_the_media_does_not_count_and_batches_do_not_matter(coder, makes):
    def said(sample, prompt, text):
        talk = [{"role": "user", "content": f"{prompt}{'.' * len(prompt)}"}]
        answer = [{"type": "text", "text": text}, *sample.messages[-1]["content"]]
        return Conversation(prompt, [*talk, {"role": "assistant", "content": answer}])

    plain = [makes(one.lower() * 2, one) for one in "ABCDE"]
    model, processor = coder(asked=1.5)
    first = evaluate_prompting(model, processor, plain, batch_size=2)
    texts = [
        said(sample, one.lower() * 2, "....") for one, sample in zip("ABCDE", plain, strict=True)
    ]
    for size in (1, 5):
        other = evaluate_prompting(model, processor, texts, batch_size=size)
        assert other["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert other["shuffled"]["delta"] == pytest.approx(3.0, abs=1e-5)
    assert "passed" not in first


def test_prompts_change_places_only_where_they_differ(coder, makes):
    samples = [makes("a", word) for word in ("A", "AB", "B")] + [makes("b", "C")]
    record = evaluate_prompting(*coder(), samples)
    assert record["shuffled"]["samples"] == 2
    assert record["not_shuffled"] == 2
    with pytest.raises(DataError, match="prompts of 3 conversations are all the same"):
        evaluate_prompting(*coder(), samples[:3])


def test_what_does_not_end_with_media_is_refused_and_left_out_of_gates(coder, makes, shows):
    evaluation = Prompting(PromptingConfig.parse({"source": "words"}))
    assert evaluation.suits(makes("a", "A"))
    wrong = shows("A")
    assert not evaluation.suits(wrong)
    with pytest.raises(DataError, match="conversation 'A': expected a prompt and then"):
        evaluate_prompting(*coder(), [makes("a", "A"), wrong])


def test_the_config_reaches_the_evaluation_and_gives_the_checks(coder, makes):
    config = PromptingConfig.parse({"source": "words", "shuffled": {"delta": 9.0, "wins": 0.9}})
    evaluation = Prompting(config)
    record = evaluation.run(*coder(), asked(makes))
    wins, delta = evaluation.checks(record)
    assert (wins.value, wins.at_least, wins.passed) == (1, 0.9, True)
    assert (delta.at_least, delta.passed) == (9.0, False)
    assert record["passed"] is False
    assert wins.interval == pytest.approx((0.6097, 1), abs=1e-3)  # Wilson, 6 of 6
