"""Proves that spoken digits are the same whenever they are spoken, differ by word, voice, speed and
pitch, and that what cannot be said is told. Needs the extra `speech`.
"""

import sys

import numpy as np
import pytest

from xoron_audio.speech_digits import PITCHES, SPEEDS, VOICES, Utterance, speak, utterances
from xoron_core.errors import DataError, UsageError


@pytest.fixture
def synthesiser():
    pytest.importorskip("espeakng_loader", reason="needs xoron-audio[speech]")


@pytest.mark.usefixtures("synthesiser")
def test_an_utterance_is_the_same_whatever_was_spoken_before():
    said = [Utterance(digit, voice) for voice in VOICES[:3] for digit in (0, 6, 8)]
    first = [speak(each).samples for each in said]
    again = [speak(each).samples for each in reversed(said)][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("synthesiser")
def test_words_voices_speeds_and_pitches_differ():
    base = Utterance(3)
    changed = [Utterance(5), Utterance(3, voice="en+f1"), Utterance(3, pitch=20)]
    sounds = [speak(each).samples for each in (base, *changed)]
    assert len({sound.tobytes() for sound in sounds}) == 4
    slow, fast = (speak(Utterance(3, speed=speed)).seconds for speed in (110, 220))
    assert slow > 1.3 * fast


@pytest.mark.usefixtures("synthesiser")
def test_every_voice_says_every_digit_at_8_khz():
    for voice in VOICES:
        for digit in (1, 7):
            audio = speak(Utterance(digit, voice))
            assert audio.rate == 8000
            assert audio.samples.shape[0] == 1
            assert audio.samples.dtype == np.float32
            assert 0.2 < audio.seconds < 1
            assert np.abs(audio.samples).max() == pytest.approx(0.5, abs=0.1)
            # Sound begins and ends at once.
            edges = (audio.samples[0, :400], audio.samples[0, -400:])
            assert min(np.abs(edge).max() for edge in edges) > 0.004
    assert speak(Utterance(1), rate=16000).samples.shape[-1] > 3000


@pytest.mark.usefixtures("synthesiser")
def test_a_voice_that_is_not_there_is_told():
    with pytest.raises(DataError, match="no voice 'en-nowhere'"):
        speak(Utterance(1, "en-nowhere"))


def test_there_is_every_digit_in_every_way():
    said = utterances()
    assert len(set(said)) == len(said) == len(VOICES) * len(SPEEDS) * len(PITCHES) * 10
    assert len(utterances(voices=VOICES[:2], speeds=(150,), pitches=(50,))) == 20


def test_what_cannot_be_said_is_told(monkeypatch):
    for wrong, words in (
        ({"digit": 10}, "digit is 10, expected 0 to 9"),
        ({"digit": 1, "speed": 10}, "speed is 10, expected 80 to 450"),
        ({"digit": 1, "pitch": 100}, "pitch is 100, expected 0 to 99"),
    ):
        with pytest.raises(DataError, match=words):
            Utterance(**wrong)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UsageError, match=r"pip install 'xoron-audio\[speech\]'"):
        speak(Utterance(1))
