"""Digits in some medium, read or made: what `token-digits` and `token-speech` have in common.

- `train`: three conversations in four read the digit from the medium, one makes the medium, because
  a medium teaches with every id and a digit with one.
- `held-out`: media of other people or voices, to be read.
- `made`: the same, to be made.

Conversation i of a split is a pure function of (seed, split, i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from xoron_core.config import Config
from xoron_core.errors import ConfigError, did_you_mean
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation

MADE = "made"
SPLITS = (TRAIN, HELD_OUT, MADE)
READ, MAKE = "read", "make"


class TokenMediaOptions(Config):
    """Options of the data sets.

    Attributes:
        seed: of all media.
        samples: how many conversations a split has.
    """

    seed: int = Field(default=0, ge=0)
    samples: int = Field(default=1_000_000, ge=1)


class TokenMedia(ABC):
    """One split.

    Args:
        split: of `SPLITS`.
        **options: of `TokenMediaOptions`.

    Attributes:
        name: of the data set.
        content_type: of the medium in a message.
        question: what asks for the digit.

    Raises:
        ConfigError: for an unknown split or option.
        PluginError: without what media are made with.
    """

    name: ClassVar[str]
    content_type: ClassVar[str]
    question: ClassVar[str]

    def __init__(self, split: str, **options: Any) -> None:
        if split not in SPLITS:
            raise ConfigError(
                f"{self.name} has no split {split!r}.{did_you_mean(split, SPLITS)} It has:"
                f" {', '.join(SPLITS)}"
            )
        self.split, self.options = split, TokenMediaOptions.parse(options)

    @staticmethod
    @abstractmethod
    def prompt(digit: int) -> str:
        """What asks for a digit to be made."""

    @abstractmethod
    def medium(self, rng: np.random.Generator, digit: int) -> Any:
        """A medium that shows a digit, as its modality loads it."""

    def __len__(self) -> int:
        return self.options.samples

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} has {len(self)} conversations, got {index}")
        digit, medium = self.draw(index)
        shown = {"type": self.content_type, self.content_type: medium}
        asked: Any
        answer: Any
        if self.split == MADE or (self.split == TRAIN and index % 4 == 0):
            asked, answer, kind = self.prompt(digit), [shown], MAKE
        else:
            asked, answer, kind = [shown, {"type": "text", "text": self.question}], str(digit), READ
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
        return Conversation(f"{self.split}-{index}", messages, kind)

    def draw(self, index: int) -> tuple[int, Any]:
        """The digit and the medium behind conversation `index`."""
        part = (self.options.seed, SPLITS.index(self.split), index)
        rng = np.random.default_rng(part)
        digit = int(rng.integers(10))
        return digit, self.medium(rng, digit)


class Reader(ABC):
    """A classifier of digits: a support vector machine on media that were never through a codec.

    It knows nothing of the model, so it may judge what a codec keeps and what a model makes.

    Args:
        split: `train`, under another seed than the model's.
        samples: media of it to learn from.
    """

    def __init__(self, split: TokenMedia, *, samples: int) -> None:
        # The data set has said how to install it, or needs it for more.
        from sklearn.svm import SVC

        drawn = [split.draw(index) for index in range(samples)]
        features = self.features([medium for _, medium in drawn])
        self._classifier = SVC(C=10.0).fit(features, [digit for digit, _ in drawn])

    @abstractmethod
    def features(self, media: Sequence[Any]) -> np.ndarray:
        """(n, F) of n media."""

    def read(self, media: Sequence[Any]) -> np.ndarray:
        """(n,) digits of n media."""
        return np.asarray(self._classifier.predict(self.features(media)))
