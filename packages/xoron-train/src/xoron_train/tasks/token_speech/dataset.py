"""`token-speech`: one spoken digit per recording, heard or said; other voices to be judged on.

Made by the synthesiser of xoron-audio, some 0.3 to 0.7 seconds at 8 kHz.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from xoron_core.errors import PluginError
from xoron_train.conversation import TRAIN
from xoron_train.tasks.token_media import TokenMedia

if TYPE_CHECKING:
    from xoron_audio.audio import Audio

# A man's and a woman's, in accents that are trained on too.
_OTHER_VOICES = ("en-us+f2", "en-gb-x-rp+m2")
_STRETCH = (0.93, 1.07)
_LOUDNESS = (0.4, 1.0)
_NOISE = 0.002
_SILENCE = 0.04


class TokenSpeech(TokenMedia):
    """One split; its recordings are mono. Those of `train` vary in pitch and speed."""

    name = "token-speech"
    content_type = "audio"
    question = "Which digit is said?"

    def __init__(self, split: str, **options: Any) -> None:
        super().__init__(split, **options)
        try:
            from xoron_audio.speech_digits import PITCHES, SPEEDS, VOICES
        except ImportError:
            raise PluginError(
                "the data set token-speech is spoken by xoron-audio; run:"
                " pip install 'xoron-train[speech]'"
            ) from None
        heard = [voice for voice in VOICES if voice not in _OTHER_VOICES]
        self.voices = heard if split == TRAIN else list(_OTHER_VOICES)
        self.speeds, self.pitches = SPEEDS, PITCHES

    @staticmethod
    def prompt(digit: int) -> str:
        """What asks for a digit to be said."""
        return f"Say {digit}."

    def medium(self, rng: np.random.Generator, digit: int) -> Audio:
        """A digit in one of the split's voices, a little silence around it, and faint noise."""
        from xoron_audio.audio import Audio

        how = [
            options[rng.integers(len(options))]
            for options in (self.voices, self.speeds, self.pitches)
        ]
        samples, rate = _spoken(digit, *how)
        if self.split == TRAIN:
            samples = _stretched(samples, rng.uniform(*_STRETCH))
        around = rng.integers(0, int(_SILENCE * rate), 2)
        samples = np.pad(samples * rng.uniform(*_LOUDNESS), around)
        samples = samples + _NOISE * rng.standard_normal(len(samples))
        return Audio(samples[None].astype(np.float32), rate)


@cache
def _spoken(digit: int, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, int]:
    from xoron_audio.speech_digits import Utterance, speak

    said = speak(Utterance(digit, voice, speed, pitch))
    return said.samples[0], said.rate


def _stretched(samples: np.ndarray, factor: float) -> np.ndarray:
    """So many times as long, and so much lower."""
    places = np.linspace(0, len(samples) - 1, round(len(samples) * factor))
    return np.interp(places, np.arange(len(samples)), samples)
