"""Proves that `seeing` asks about media that come in as ids of a codec, on a model made by hand.

Known losses under every intervention; losses with other codes equal those of conversations whose
words were exchanged by hand, and what the assistant makes through the same codec stays; the codec
is left as it was.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xoron_core.components import Codes
from xoron_core.errors import SequenceError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import Gate, evaluate_answers, evaluate_seeing
from xoron_train.evaluations.code_interventions import CodeCounts
from xoron_train.evaluations.interventions import Interventions
from xoron_train.evaluations.plan_losses import plan_losses

ALL = {name: Gate() for name in ("shuffled", "zeroed", "noised")}
SLOT = "word.codec"


def test_a_model_that_copies_the_codes_it_is_shown_passes(coder, shows):
    record = evaluate_seeing(*coder(), [shows(letter) for letter in "BCDEF"], gates=ALL)
    assert record["passed"]
    # Zero is the code of A, so all are shown an A; a wrong letter costs what the right one gained.
    for name in ("shuffled", "zeroed"):
        assert record[name]["delta"] == pytest.approx(8 / 3, abs=1e-5)
        assert record[name]["wins"] == 1
    assert 0 < record["noised"]["delta"] <= 8 / 3 + 1e-5


def test_a_blind_model_shows_no_difference(coder, shows):
    samples = [shows(word) for word in ("B", "CD", "EFG", "HI", "J")]
    record = evaluate_seeing(*coder(reads=0), samples, gates=ALL, batch_size=2)
    assert [record[name]["delta"] for name in ALL] == [0, 0, 0]
    assert record["passed"] is False


def both(shown, made):
    """A user shows a word and asks for one, and the assistant makes one, all through one codec."""
    content = [{"type": "word", "word": shown}, {"type": "text", "text": made[0].lower()}]
    answer = [{"type": "word", "word": made}, {"type": "text", "text": made[0]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Conversation(f"{shown}-{made}", messages)


def losses_of(model, processor, samples):
    plans = [processor.plan(sample.messages, train=True) for sample in samples]
    return plan_losses(model.eval(), processor, plans, names=[s.name for s in samples])


def test_codes_are_exchanged_as_by_hand_and_what_is_made_stays(coder):
    model, processor = coder(reads=3.0)
    pairs = [("A", "BC"), ("DE", "F"), ("G", "HI"), ("JK", "L"), ("M", "NR"), ("OP", "Q")]
    samples = [both(*pair) for pair in pairs]
    record = evaluate_seeing(model, processor, samples, batch_size=4, seed=2)
    shown = Interventions(
        model,
        processor,
        lambda index: processor.plan(samples[index].messages, train=True),
        slots=[SLOT],
        seed=2,
    )
    shown.read(range(len(samples)))
    shown.shuffle([made for _, made in pairs])
    words = [pairs[places[0].sample][0] for places in shown.takes]
    exchanged = [both(word, made) for word, (_, made) in zip(words, pairs, strict=True)]
    assert all(one.name != two.name for one, two in zip(samples, exchanged, strict=True))
    for name, them in (("correct", samples), ("shuffled", exchanged)):
        found = record["loss"] if name == "correct" else record[name]["loss"]
        assert found == pytest.approx(np.mean(losses_of(model, processor, them)), 1e-6)
    zero = [both("A" * len(word), made) for word, made in pairs]
    zeroed = np.mean(losses_of(model, processor, zero))
    assert record["zeroed"]["loss"] == pytest.approx(zeroed, 1e-6)


def test_answers_are_asked_again_without_the_right_codes(coder, shows):
    samples = [shows(letter) for letter in "BCDE"]
    record = evaluate_answers(*coder(), samples, controls=["zeroed", "shuffled"])
    assert record["score"] == 1
    assert [record["controls"][name]["score"] for name in ("zeroed", "shuffled")] == [0, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_codec_is_left_as_it_was(coder, shows, fails, monkeypatch):
    model, processor = coder()
    codec = model.part(SLOT)
    seen = []
    forward = type(model.backbone).forward

    def counted(self, *args, **kwargs):
        seen.append("encode" in vars(codec))
        if fails and len(seen) == 3:
            raise SequenceError("stop")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone), "forward", counted)
    samples = [shows(letter) for letter in "ABCD"]
    if fails:
        with pytest.raises(SequenceError, match="stop"):
            evaluate_seeing(model, processor, samples, batch_size=2)
    else:
        evaluate_seeing(model, processor, samples, batch_size=2)
    assert all(seen)
    assert "encode" not in vars(codec)


def test_noise_has_the_frequencies_of_all_codes():
    counts = CodeCounts()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counts.add(Codes(torch.tensor([[[3, 0], [1, 0], [9, 9]], [[3, 2], [9, 9], [9, 9]]]), mask, []))
    counts.add(Codes(torch.full((1, 1, 2), 5), torch.ones(1, 1, dtype=torch.bool), []))
    drawn = counts.draw(100_000, seed=0)
    expected = [[0, 0.25, 0, 0.5, 0, 0.25], [0.5, 0, 0.25, 0, 0, 0.25]]
    for column, shares in zip(drawn.unbind(-1), expected, strict=True):
        found = torch.bincount(column, minlength=6) / len(column)
        torch.testing.assert_close(found, torch.tensor(shares), rtol=0, atol=0.01)
    assert torch.equal(drawn, counts.draw(100_000, seed=0))
