"""Proves the evaluation `seeing` on a model made by hand, whose losses are known.

A model that copies what it is shown passes, a blind one shows no difference at all, one that sees
wrong is caught. Losses under interventions equal losses computed by another path, and nothing of
the model remains changed.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from xoron_core.components import Features
from xoron_core.errors import ConfigError, DataError, SequenceError, XoronError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import Gate, SeeingConfig, evaluate_seeing
from xoron_train.evaluations.comparison import compare, interval
from xoron_train.evaluations.interventions import Interventions, Moments, judging
from xoron_train.evaluations.seeing import Seeing

ALL = {name: Gate() for name in ("shuffled", "zeroed", "noised")}
SLOT = "word.encoder"


def one_by_one(model, processor, samples):
    """Mean nats of each sample by the model's own loss, one at a time."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            losses.append(float(model(**processor(sample.messages, train=True)).loss))
    return losses


def test_a_model_that_copies_what_it_is_shown_passes(speller, shows):
    record = evaluate_seeing(*speller(), [shows(letter) for letter in "ABCDEF"], gates=ALL)
    assert record["passed"]
    # Of the three ids that are learned only the letter depends on what is shown, and a wrong letter
    # costs what the right one would have gained.
    assert record["shuffled"]["delta"] == pytest.approx(8 / 3, abs=1e-6)
    assert record["shuffled"]["wins"] == 1
    assert record["shuffled"]["samples"] == 6
    json.dumps(record)


def test_a_blind_model_shows_no_difference_at_all(speller, shows):
    samples = [shows(word) for word in ("A", "BC", "DEF", "GH", "IJK", "L", "MN")]
    record = evaluate_seeing(*speller(gain=0), samples, batch_size=3)
    for name in ("shuffled", "zeroed", "noised"):
        assert record[name]["delta"] == 0
        assert record[name]["wins"] == 0.5
        assert record[name]["interval"] == [0, 0]
    assert record["passed"] is False


def test_a_model_that_sees_wrong_is_caught(speller, shows):
    record = evaluate_seeing(*speller(gain=-8), [shows(letter) for letter in "ABCDEF"], gates=ALL)
    assert record["shuffled"]["delta"] < -1
    assert record["shuffled"]["wins"] == 0
    assert not any(record[name]["passed"] for name in ALL)


def test_losses_equal_those_of_conversations_with_the_others_media(speller, shows):
    model, processor = speller()
    words = ["A", "BC", "DEF", "GH", "IJKO", "L", "MN", "PQR"]
    samples = [shows(word) for word in words]
    record = evaluate_seeing(model, processor, samples, batch_size=3, seed=4)

    def plan(index):
        return processor.plan(samples[index].messages, train=True)

    shown = Interventions(model, processor, plan, slots=[SLOT], seed=4)
    shown.read(range(len(samples)))
    shown.shuffle(range(len(samples)))
    wrong = []
    for word, places in zip(words, shown.takes, strict=True):
        if places is not None:
            other = words[places[0].sample]
            assert other != word
            assert len(other) == len(word)
            wrong.append(shows(other, answer=word[0]))
    assert record["loss"] == pytest.approx(np.mean(one_by_one(model, processor, samples)), 1e-6)
    assert record["shuffled"]["loss"] == pytest.approx(
        np.mean(one_by_one(model, processor, wrong)), 1e-6
    )
    assert record["shuffled"]["samples"] == 7  # no other word has four letters
    assert record["not_shuffled"] == 1


def test_zeroed_is_the_loss_without_any_evidence(speller, shows):
    model, processor = speller()
    record = evaluate_seeing(model, processor, [shows(letter) for letter in "ABC"])
    rows = processor.space.size
    # The letter is one of all rows; the end behind it has the letter's evidence of 16, and so has
    # the line break behind the end, against it.
    total = math.log(rows - 1 + math.e**16)
    assert record["zeroed"]["loss"] == pytest.approx((math.log(rows) + 2 * total - 16) / 3, 1e-6)


def test_noise_has_the_moments_of_all_features():
    torch.manual_seed(0)
    values = torch.randn(5, 7, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, -4.0, 90.0])
    mask = torch.rand(5, 7) < 0.6
    moments = Moments()
    for rows in (slice(0, 2), slice(2, 5)):
        moments.add(Features(values[rows], mask[rows]))
    drawn = moments.draw(200_000, seed=1)
    seen = values[mask]
    torch.testing.assert_close(drawn.mean(0), seen.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(drawn.std(0), seen.std(0, correction=0), rtol=0.02, atol=0.001)


def test_the_batch_size_does_not_matter(speller, shows):
    model, processor = speller()
    words = ["A", "BC", "DEF", "GH", "IJK", "L", "MN", "AB", "XYZ"]
    samples = [shows(word) for word in words] + [shows([])] + [shows(["A", "Q"]), shows(["R", "S"])]
    first, *others = (
        evaluate_seeing(model, processor, samples, batch_size=size, gates=ALL)
        for size in (1, 5, 64)
    )
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], abs=1e-5)
        for name in ALL:
            for key in ("loss", "delta", "wins", "interval"):
                assert other[name][key] == pytest.approx(first[name][key], abs=1e-5)
    assert first["without_media"] == 1
    # Noise is no constant: without its own seed per medium the sizes would not agree.
    assert first["noised"]["interval"][0] < first["noised"]["interval"][1]


def test_all_media_of_a_conversation_are_replaced(speller, shows):
    samples = [shows(["A", "A"]), shows(["B", "B"]), shows(["C", "C"])]
    record = evaluate_seeing(*speller(), samples)
    # Had one of the two been left, its letter would still have half the evidence.
    assert record["shuffled"]["delta"] == pytest.approx(16 / 3, abs=1e-4)


def test_equal_media_never_count_as_shuffled(speller, shows):
    samples = [shows("A") for _ in range(5)] + [shows("B"), shows("C")]
    record = evaluate_seeing(*speller(), samples)
    assert record["samples"] == 7
    assert record["shuffled"]["samples"] == 4
    assert record["not_shuffled"] == 3
    assert record["shuffled"]["delta"] == pytest.approx(8 / 3, abs=1e-6)


def test_without_different_media_there_is_nothing_to_compare(speller, shows):
    model, processor = speller()
    with pytest.raises(DataError, match=r"1 of 2 conversations have media for word.encoder"):
        evaluate_seeing(model, processor, [shows("A"), shows([])])
    with pytest.raises(DataError, match="nothing can be shuffled between 3 conversations"):
        evaluate_seeing(model, processor, [shows("A")] * 3)
    with pytest.raises(DataError, match="nothing can be shuffled between 2 conversations"):
        evaluate_seeing(model, processor, [shows("A"), shows("BC")])


def test_conversations_that_cannot_be_judged_are_named(speller, shows):
    model, processor = speller()
    silent = Conversation("silent", shows("A").messages[:1])
    with pytest.raises(DataError, match="conversation 'silent': the assistant says nothing"):
        evaluate_seeing(model, processor, [shows("A"), silent])
    broken = Conversation("broken", shows("a").messages)
    with pytest.raises(DataError, match="conversation 'broken': word: 'a' is no word"):
        evaluate_seeing(model, processor, [shows("A"), broken])


def test_slots_are_encoders(speller, shows):
    model, processor = speller()
    samples = [shows("A"), shows("B")]
    with pytest.raises(ConfigError, match=r"no encoder or codec in image.encoder; .* word.encoder"):
        evaluate_seeing(model, processor, samples, slots=["image.encoder"])
    assert evaluate_seeing(model, processor, samples, slots=[SLOT])["passed"]


def test_a_loss_that_is_not_finite_is_an_error(speller, shows):
    model, processor = speller()
    with torch.no_grad():
        model.backbone.model.head.weight.fill_(float("nan"))
    with pytest.raises(XoronError, match="the loss on conversation 'A' is nan"):
        evaluate_seeing(model, processor, [shows("A"), shows("B")])


def state_of(model):
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return hooks, modes, weights, torch.get_rng_state()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_is_changed(speller, shows, fails, monkeypatch):
    model, processor = speller()
    model.train()
    model.part(SLOT).eval()  # as a frozen tower may be kept while the rest is trained
    torch.rand(3)
    before = state_of(model)
    calls = []
    forward = type(model.backbone).forward

    def counted(self, *args, **kwargs):
        calls.append(self.training)
        if fails and len(calls) == 3:
            raise SequenceError("stop")
        torch.rand(3)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone), "forward", counted)
    if fails:
        with pytest.raises(SequenceError, match="stop"):
            evaluate_seeing(model, processor, [shows(letter) for letter in "ABCD"], batch_size=2)
    else:
        evaluate_seeing(model, processor, [shows(letter) for letter in "ABCD"], batch_size=2)
    assert not any(calls)
    hooks, modes, weights, random = state_of(model)
    assert hooks == before[0]
    assert modes == before[1]
    assert True in modes
    assert False in modes
    assert all(torch.equal(value, before[2][name]) for name, value in weights.items())
    assert torch.equal(random, before[3])


def test_hooks_stand_while_it_runs_and_only_then(speller, shows):
    model, processor = speller()
    samples = [shows("A"), shows("B")]

    def plan(index):
        return processor.plan(samples[index].messages, train=True)

    shown = Interventions(model, processor, plan, slots=[SLOT], seed=0)
    shown.read(range(2))
    shown.shuffle(range(len(samples)))
    batch = processor([sample.messages for sample in samples], train=True)["media"][SLOT]
    encoder = model.part(SLOT)
    with judging(model, seed=0):
        plain = encoder(letters=batch["letters"]).values
        with shown.applied("shuffled", [0, 1]):
            assert torch.equal(encoder(letters=batch["letters"]).values, plain.flip(0))
        with shown.applied("zeroed", [0, 1]):
            assert not encoder(letters=batch["letters"]).values.any()
        assert torch.equal(encoder(letters=batch["letters"]).values, plain)


def test_comparison_by_hand():
    correct, without = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 2.5, 6.0])
    record = compare(correct, without, group=np.arange(4), gate=Gate(delta=0.6, wins=0.6), seed=0)
    assert record["delta"] == pytest.approx(2.5 / 4)
    assert record["wins"] == pytest.approx(2.5 / 4)
    assert record["passed"] is True
    stricter = [Gate(delta=0.63, wins=0.6), Gate(delta=0.6, wins=0.63)]
    for gate in stricter:
        assert not compare(correct, without, group=np.arange(4), gate=gate, seed=0)["passed"]


def test_the_interval_covers_and_groups_widen_it():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(50):
        low, high = interval(rng.normal(1.0, 2.0, 60), group=np.arange(60), seed=trial)
        hits += low <= 1.0 <= high
    assert 43 <= hits <= 50
    # Ten questions about each of six images hold no more than six images do.
    values = np.repeat(rng.normal(size=6), 10)
    apart = interval(values, group=np.arange(60), seed=0)
    together = interval(values, group=np.arange(60) // 10, seed=0)
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert together == pytest.approx(interval(values[::10], group=np.arange(6), seed=0))


def test_the_recipes_config_reaches_the_evaluation(speller, shows):
    data = {"source": "words", "shuffled": None, "noised": {"delta": 0.0, "wins": 0.9}, "seed": 3}
    config = SeeingConfig.parse(data)
    samples = [shows(letter) for letter in "ABCD"]
    record = Seeing(config).run(*speller(), samples)
    assert "passed" not in record["shuffled"]
    assert record["passed"] == record["noised"]["passed"]
    direct = evaluate_seeing(*speller(), samples, gates={"noised": Gate(delta=0, wins=0.9)}, seed=3)
    assert record == direct
    with pytest.raises(ConfigError, match="required: true needs a gate"):
        SeeingConfig.parse({"source": "words", "required": True, "shuffled": None})
