"""Spoken digits made on the spot: ten words in several voices, for trainings without downloads.

    speak(Utterance(7, voice="en-us+f2", speed=160, pitch=50)) -> 8 kHz mono

by eSpeak NG (a formant synthesiser, Duddington 1995 and later), whose library and voices come with
`pip install 'xoron-audio[speech]'`. It is under the GPL, version 3; what it says is not.

Footguns:
- The synthesiser remembers what it said before: phases, flutter, a random generator. It is
  therefore loaded anew for each utterance, under one seed, so that an utterance is always the same
  on one machine; versions of the library differ. A platform that keeps libraries loaded (musl) has
  them differ a little by what was spoken before.
- It says one thing at a time in one process, whatever the number of threads.
- Voices of one synthesiser are far more alike than people are: a recogniser of these digits
  recognises these digits.

Shapes: N samples.
"""

from __future__ import annotations

import _ctypes
import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from threading import Lock
from typing import Any

import numpy as np

from xoron_audio.audio import Audio, converted
from xoron_core.errors import DataError, UsageError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Accents of English, with variants of men and women.
VOICES = (
    "en-us+m1", "en-us+f2", "en+m3", "en+f1", "en-gb-scotland+m7", "en-gb-scotland+f4",
    "en-gb-x-rp+m2", "en-gb-x-rp+f3", "en-029+m5", "en-029+f5",
)  # fmt: skip
SPEEDS = (130, 150, 170, 190)
PITCHES = (35, 50, 65)
RATE = 8000

# Of espeak-ng/speak_lib.h.
_SYNCHRONOUS = 2
_UTF8 = 1
_SPEED, _PITCH = 1, 3
_Receiver = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_one_at_a_time = Lock()


@dataclass(frozen=True)
class Utterance:
    """What is said, and how.

    Attributes:
        digit: 0 to 9.
        voice: a voice of eSpeak NG, with or without a variant: `en-us`, `en+f1`.
        speed: words per minute, 80 to 450.
        pitch: 0 to 99; 50 is the voice's own.
    """

    digit: int
    voice: str = VOICES[0]
    speed: int = 170
    pitch: int = 50

    def __post_init__(self) -> None:
        limits = (("digit", 0, 9), ("speed", 80, 450), ("pitch", 0, 99))
        for name, least, most in limits:
            if not least <= (value := getattr(self, name)) <= most:
                raise DataError(f"{name} is {value}, expected {least} to {most}")


def utterances(
    voices: Iterable[str] = VOICES,
    speeds: Iterable[int] = SPEEDS,
    pitches: Iterable[int] = PITCHES,
) -> list[Utterance]:
    """Every digit in every one of these ways, voice by voice."""
    return [Utterance(d, v, s, p) for v, s, p, d in product(voices, speeds, pitches, range(10))]


def speak(utterance: Utterance, *, rate: int = RATE) -> Audio:
    """Says a digit.

    Args:
        utterance: what to say, and how.
        rate: samples per second.

    Returns:
        Mono audio without silence before and behind, loudest at 0.5; always the same.

    Raises:
        UsageError: if the synthesiser is not installed.
        DataError: for a voice that it does not have.
    """
    with _one_at_a_time, _synthesiser() as (library, source_rate):
        samples = _said(library, utterance)
    audible = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    samples = samples[audible[0] : audible[-1] + 1]
    samples = 0.5 * samples / np.abs(samples).max()
    source = Audio(samples[None].astype(np.float32), source_rate)
    return Audio(converted(source, rate, 1), rate)


def _said(library: Any, utterance: Utterance) -> np.ndarray:
    """(N,) fp64 of a synthesiser that has said nothing yet."""
    pieces: list[np.ndarray] = []

    @_Receiver
    def receive(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float64))
        return 0

    library.espeak_SetSynthCallback(receive)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    if library.espeak_SetVoiceByName(utterance.voice.encode()):
        raise DataError(f"eSpeak NG has no voice {utterance.voice!r}; it has, e.g., en-us, en+f1")
    library.espeak_SetParameter(_SPEED, utterance.speed, 0)
    library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
    word = WORDS[utterance.digit].encode() + b"\0"
    library.espeak_Synth(word, len(word), 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return np.concatenate(pieces)


@contextmanager
def _synthesiser() -> Iterator[tuple[Any, int]]:
    """A fresh synthesiser and its rate; unloaded behind."""
    try:
        import espeakng_loader
    except ImportError:
        raise UsageError(
            "spoken digits need eSpeak NG; run: pip install 'xoron-audio[speech]'"
        ) from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        folder = str(espeakng_loader.get_data_path()).encode()
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, folder, 0)
        if rate <= 0:
            raise UsageError(f"eSpeak NG does not start from {folder.decode()}; reinstall it")
        yield library, rate
        library.espeak_Terminate()
    finally:
        if sys.platform == "win32":
            _ctypes.FreeLibrary(library._handle)
        else:
            _ctypes.dlclose(library._handle)
