"""Proves of the data sets `token-digits` and `token-speech` that their media show the digit that is
asked for, that splits share no medium, and that their readers read what they never learned from."""

import numpy as np
import pytest

from xoron_core.errors import ConfigError
from xoron_train.tasks.token_digits.dataset import TokenDigits
from xoron_train.tasks.token_digits.reader import DigitReader
from xoron_train.tasks.token_media import MADE, MAKE, READ, SPLITS
from xoron_train.tasks.token_speech.dataset import TokenSpeech
from xoron_train.tasks.token_speech.reader import SpeechReader

pytest.importorskip("sklearn")


def installed(data):
    if data is TokenSpeech:
        pytest.importorskip("xoron_audio")
        pytest.importorskip("espeakng_loader")
    return data


def array(medium):
    """What a medium shows: pixels, or samples."""
    return np.asarray(getattr(medium, "samples", medium))


def parts(data, conversation):
    """The digit that a conversation is about, and its medium."""
    asked, answered = conversation.messages
    if conversation.kind == READ:
        shown, question = asked["content"]
        assert question["text"] == data.question
        return int(answered["content"]), array(shown[data.content_type])
    (shown,) = answered["content"]
    (digit,) = (d for d in range(10) if asked["content"] == data.prompt(d))
    return digit, array(shown[data.content_type])


@pytest.mark.parametrize("data", [TokenDigits, TokenSpeech])
@pytest.mark.parametrize("split", SPLITS)
def test_conversations_are_of_their_direction_and_a_function_of_their_index(data, split):
    installed(data)
    one, again, other = data(split), data(split), data(split, seed=1)
    kinds = {"train": {READ, MAKE}, "held-out": {READ}, MADE: {MAKE}}[split]
    assert {one[index].kind for index in range(20)} == kinds
    for index in (3, 8, 3):
        digit, medium = parts(data, one[index])
        same, copy = parts(data, again[index])
        assert same == digit
        assert np.array_equal(copy, medium)
        assert not np.array_equal(medium, parts(data, other[index])[1])
    assert {parts(data, one[index])[0] for index in range(100)} == set(range(10))


def test_images_are_what_their_modality_takes():
    _, image = TokenDigits("train").draw(0)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "reader", "upset"),
    [
        (TokenDigits, DigitReader, lambda image: image[::-1, ::-1]),
        (TokenSpeech, SpeechReader, lambda audio: audio._replace(samples=audio.samples[:, ::-1])),
    ],
)
def test_readers_read_other_hands_and_voices_and_splits_share_no_medium(data, reader, upset):
    installed(data)
    judge = reader(samples=1000)
    seen = {array(data("train").draw(index)[1]).tobytes() for index in range(200)}
    for split in ("held-out", MADE):
        digits, media = zip(*(data(split).draw(index) for index in range(200)), strict=True)
        assert not seen & {array(medium).tobytes() for medium in media}
        right = (judge.read(media) == np.array(digits)).mean()
        upside = (judge.read([upset(medium) for medium in media]) == np.array(digits)).mean()
        print(f"{data.name} {split}: {right:.3f} read, {upside:.3f} upside down or backwards")
        assert right > 0.85
        assert upside < 0.6


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"no split 'mad'.*'made'"):
        TokenDigits("mad")
    with pytest.raises(ConfigError, match="sample"):
        TokenDigits("train", sample=5)
    with pytest.raises(IndexError):
        TokenDigits("train", samples=5)[5]
