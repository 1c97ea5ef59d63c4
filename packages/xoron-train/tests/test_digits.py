"""The data set vision-digits: its splits share neither scans nor withheld combinations, its answers
are what the scene says (found again here by other code), its images show what the scene says, and a
conversation depends on nothing but (seed, split, index)."""

from __future__ import annotations

import re
import sys
from collections import Counter

import numpy as np
import pytest

from xoron_core.errors import ConfigError, PluginError
from xoron_train.tasks.digits.baselines import Guesses
from xoron_train.tasks.digits.dataset import SPLITS, Digits, digits
from xoron_train.tasks.digits.scans import scans
from xoron_train.tasks.digits.scenes import (
    COLOURS,
    GREY,
    IMAGE_SIZE,
    KINDS,
    Scene,
    render,
    withheld,
)

pytest.importorskip("sklearn")
_MANY = 800


def _combinations(split: Digits, count: int = _MANY) -> set[tuple[str, str]]:
    scenes = [split.draw(index)[0] for index in range(count)]
    return {(thing.kind, thing.colour) for scene in scenes for thing in scene}


def test_what_is_unseen_never_stands_in_training() -> None:
    everything = {(kind, colour) for kind in KINDS for colour in COLOURS}
    kept_out = {pair for pair in everything if withheld(*pair)}
    assert len(kept_out) == len(KINDS)
    assert {kind for kind, _ in kept_out} == set(KINDS)
    assert {colour for _, colour in kept_out} == set(COLOURS)
    assert _combinations(digits("train", grey=0)) == everything - kept_out
    grey = _combinations(digits("train", grey=1))
    assert grey == {(kind, GREY) for kind in KINDS}
    for split in ("held-out", "unseen"):
        assert GREY not in {colour for _, colour in _combinations(digits(split, grey=1))}
    assert _combinations(digits("held-out")) == everything - kept_out
    assert _combinations(digits("unseen")) == kept_out


def test_no_scan_is_near_one_of_the_other_side() -> None:
    trained, others = (scans(trained=side).images.reshape(-1, 64) * 16 for side in (True, False))
    assert (len(trained), len(others)) == (1437, 360)
    distances = np.linalg.norm(trained[:, None] - others, axis=-1)
    assert distances.min() > 9
    # What a split without regard to hands could let across.
    together = np.concatenate((trained, others))
    among = np.linalg.norm(together[:, None] - together, axis=-1)
    assert among[~np.eye(len(together), dtype=bool)].min() < 6


@pytest.mark.parametrize("split", SPLITS)
def test_a_conversation_is_a_function_of_seed_split_and_index(split: str) -> None:
    one, again, other = digits(split), digits(split), digits(split, seed=1)
    last = one[7]
    for index in (7, 3, 7):
        assert one[index].messages[1:] == again[index].messages[1:]
        assert np.array_equal(_image(one, index), _image(again, index))
    assert again[7].messages[1:] == last.messages[1:]
    assert not np.array_equal(_image(one, 7), _image(other, 7))
    assert not np.array_equal(_image(one, 7), _image(one, 8))


def _image(split: Digits, index: int) -> np.ndarray:
    return split[index].messages[0]["content"][0]["image"]


def test_splits_do_not_share_images() -> None:
    images = [_image(digits(split), i).tobytes() for split in SPLITS for i in range(200)]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_what_the_scene_says(split: str) -> None:
    seen = Counter()
    for index in range(_MANY):
        scene, questions = digits(split, grey=0.2).draw(index)
        for question in questions:
            assert question.answer == _answer(question.text, scene), question
            seen[question.kind] += 1
    assert min(seen[kind] for kind in ("digit", "colour", "count", "side")) > _MANY / 5


def _answer(text: str, scene: Scene) -> str:
    """Reads the scene anew; unpacking fails where a question has no one answer."""
    if match := re.fullmatch(r"Which column is the (\w+) in\?", text):
        (one,) = (thing for thing in scene if thing.kind == match[1])
        return "abcdefgh"[(2 * one.x + one.side) // 16]
    if text == "Which digit is there?":
        (only,) = (thing for thing in scene if thing.kind in "0123456789")
        return only.kind
    if match := re.fullmatch(r"Which digit is (\w+)\?", text):
        (one,) = (t for t in scene if t.colour == match[1] and t.kind in "0123456789")
        return one.kind
    if match := re.fullmatch(r"What colour is the (\w+)\?", text):
        (one,) = (thing for thing in scene if thing.kind == match[1])
        return one.colour
    if match := re.fullmatch(r"Is the (\w+) left or right of the (\w+)\?", text):
        (a,), (b,) = ([t for t in scene if t.kind == match[n]] for n in (1, 2))
        return "left" if 2 * a.x + a.side < 2 * b.x + b.side else "right"
    of = re.fullmatch(r"How many (\w+)( things)?\?", text)
    assert of is not None, text
    if of[2]:
        return str([thing.colour for thing in scene].count(of[1]))
    return str(sum((len(thing.kind) == 1) == (of[1] == "digits") for thing in scene))


@pytest.mark.parametrize("split", SPLITS)
def test_images_show_what_the_scene_says(split: str) -> None:
    names, colours = list(COLOURS), np.array(list(COLOURS.values()))
    for index in range(200):
        scene, _ = digits(split).draw(index)
        image = _image(digits(split), index)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert image.dtype == np.uint8
        ground = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for thing in scene:
            box = np.s_[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
            pixels = image[box].reshape(-1, 3).astype(int)
            assert len(pixels) == thing.side**2  # wholly inside
            brightest = pixels[pixels.max(-1).argsort()[-10:]].mean(0)
            if thing.colour == GREY:
                assert np.ptp(brightest) < 40
                assert brightest.max() < 195
            else:
                assert names[np.abs(colours - brightest).sum(-1).argmin()] == thing.colour
            assert ground[box].all()  # not on another thing
            ground[box] = False
        assert image[ground].max() < 90


def test_scans_belong_to_their_digit_and_side() -> None:
    for trained in (True, False):
        side = scans(trained=trained)
        assert sorted(np.concatenate(side.by_digit)) == list(range(len(side.images)))
    from sklearn.datasets import load_digits

    targets = load_digits().target
    for split, start in (("train", 0), ("held-out", 1437), ("unseen", 1437)):
        for index in range(200):
            for thing in digits(split).draw(index)[0]:
                assert not thing.is_digit or targets[start + thing.scan] == int(thing.kind)


def test_guessing_from_the_text_gains_little() -> None:
    guesses = Guesses(samples=2000)
    for split in ("held-out", "unseen"):
        chance, text = guesses.scores(digits(split), samples=_MANY)
        assert set(chance) == {"all", "digit", "colour", "count", "side"}
        for scores in (chance, text):
            for kind, most in {"digit": 0.2, "colour": 0.3, "count": 0.6, "side": 0.6}.items():
                assert scores[kind] < most
            assert scores["all"] < 0.4
    assert guesses.scores(digits("unseen"), samples=400)[1]["colour"] == 0


def test_what_is_asked_stands_in_turns_and_once() -> None:
    split = digits("train", questions=("side", "count", "side"))
    numbers, sides = set(), Counter()
    for index in range(100):
        messages = split[index].messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
        assert "labels" not in messages[0]["content"][0]
        asked = [messages[0]["content"][1]["text"], *(m["content"] for m in messages[2::2])]
        assert len(set(asked)) == len(asked)
        numbers.add(len(asked))
        sides[sum("left or right" in text for text in asked)] += 1
    assert numbers == {1, 2, 3}
    assert set(sides) == {0, 1, 2}  # a scene may have none, or the same be drawn twice
    assert sides[2] > 30
    judged = digits("held-out")
    assert [judged[index].kind for index in range(4)] == ["digit", "colour", "count", "side"]
    assert all(len(judged[index].messages) == 2 for index in range(50))


def test_labels_say_what_lies_in_each_square() -> None:
    split = digits("train", labelled=16)
    told = Counter()
    for index in range(400):
        scene, _ = split.draw(index)
        labels = split[index].messages[0]["content"][0]["labels"]
        assert len(labels) == 16
        assert labels.count(".") == 16 - len(scene)
        for thing in scene:
            row, column = (int((start + thing.side / 2) // 16) for start in (thing.y, thing.x))
            said = labels[4 * row + column]
            eighth = "abcdefgh"[(2 * thing.x + thing.side) // 16]
            assert said in {thing.kind, thing.colour, eighth} - {GREY}
            told[said == thing.kind, said == thing.colour] += thing.colour != GREY
    shares = [told[what] / told.total() for what in ((True, False), (False, True), (False, False))]
    assert np.allclose(shares, (0.5, 0.25, 0.25), atol=0.06)
    for split_name in ("held-out", "unseen"):
        judged = digits(split_name, labelled=16)[0].messages
        assert "labels" not in judged[0]["content"][0]


def test_training_scans_are_varied_and_others_are_not() -> None:
    split = digits("train")
    scenes = (split.draw(index)[0] for index in range(100))
    scene = next(one for one in scenes if one[0].is_digit)
    drawn = [
        render(scene, split.scans, np.random.default_rng(seed), varied=varied)
        for varied in (True, False)
        for seed in (0, 1)
    ]
    changes = [np.abs(a.astype(int) - b).mean() for a, b in (drawn[:2], drawn[2:])]
    assert changes[0] > 1.2 * changes[1]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no split 'heldout'.*'held-out'"):
        digits("heldout")
    with pytest.raises(ConfigError, match="question"):
        digits("train", question=3)
    with pytest.raises(ConfigError, match="'column'"):
        digits("train", questions=["colums"])
    with pytest.raises(ConfigError, match="nothing to learn"):
        digits("train", questions=[])
    with pytest.raises(ConfigError, match="no square number"):
        digits("train", labelled=15)
    with pytest.raises(IndexError):
        digits("train", samples=5)[5]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(PluginError, match=r"pip install 'xoron-train\[digits\]'"):
        digits("train")
