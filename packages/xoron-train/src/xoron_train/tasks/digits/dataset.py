"""The splits of `vision-digits` as conversations.

- `train`: scans of some hands; of all combinations of a digit or shape with a colour, five in six.
  A conversation asks several questions and then, if told to, for everything that is there.
- `held-out`: scans of other hands, combinations as in training; one question each.
- `unseen`: scans of other hands, and every thing a combination that never stands in training.

Conversation i of a split is a pure function of (seed, split, i).

Footgun: what has been answered stands before the next question, so a model could learn from text
alone; that is why the description, which tells all, comes last.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from xoron_core.config import Config
from xoron_core.errors import ConfigError, did_you_mean
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation
from xoron_train.tasks.digits.questions import ASKED, Question, ask, describe, draw_map
from xoron_train.tasks.digits.scans import scans
from xoron_train.tasks.digits.scenes import Scene, draw_scene, render

UNSEEN = "unseen"
SPLITS = (TRAIN, HELD_OUT, UNSEEN)


class DigitsOptions(Config):
    """Options of the data set.

    Attributes:
        seed: of all scenes.
        samples: how many conversations a split has.
        questions: of a training conversation, at most; of different kinds where the scene has them.
        describe: whether a training conversation ends with everything that is there.
    """

    seed: int = Field(default=0, ge=0)
    samples: int = Field(default=100_000, ge=1)
    questions: int = Field(default=3, ge=0, le=len(ASKED))
    describe: bool = True
    maps: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not (self.questions or self.describe):
            raise ValueError("questions: 0 with describe: false leaves nothing to learn")
        return self


class Digits:
    """One split.

    Args:
        split: of `SPLITS`.
        options: of the data set.
    """

    def __init__(self, split: str, options: DigitsOptions) -> None:
        self.split, self.options = split, options
        self.scans = scans(trained=split == TRAIN)

    def __len__(self) -> int:
        return self.options.samples

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} has {len(self)} conversations, got {index}")
        scene, questions = self.draw(index)
        messages: list[dict[str, Any]] = []
        for question in questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        image = {"type": "image", "image": self.image(index, scene)}
        messages[0]["content"] = [image, {"type": "text", "text": messages[0]["content"]}]
        kind = questions[0].kind if len(questions) == 1 else ""
        return Conversation(f"{self.split}-{index}", messages, kind)

    def draw(self, index: int) -> tuple[Scene, list[Question]]:
        """The scene and the questions behind conversation `index`."""
        rng = self._rng(index, 0)
        if self.split == TRAIN:
            scene = draw_scene(rng, self.scans, unseen=False)
            mapped = rng.random() < self.options.maps
            return scene, [draw_map(scene, rng)] if mapped else self._several(scene, rng)
        kind = list(ASKED)[index % len(ASKED)]
        while True:
            scene = draw_scene(rng, self.scans, unseen=self.split == UNSEEN)
            question = ask(scene, kind, rng)
            if question is not None:
                return scene, [question]

    def image(self, index: int, scene: Scene) -> np.ndarray:
        """The image of conversation `index`: (64, 64, 3) uint8."""
        return render(scene, self.scans, self._rng(index, 1))

    def _rng(self, index: int, part: int) -> np.random.Generator:
        return np.random.default_rng((self.options.seed, SPLITS.index(self.split), index, part))

    def _several(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        kinds = rng.permutation(list(ASKED))
        found = [question for kind in kinds if (question := ask(scene, kind, rng))]
        found = found[: self.options.questions]
        return [*found, describe(scene)] if self.options.describe else found


def digits(split: str, **options: Any) -> Digits:
    """One split of the data set.

    Args:
        split: `train`, `held-out` or `unseen`.
        **options: see `DigitsOptions`.

    Raises:
        ConfigError: for an unknown split or option.
        PluginError: without scikit-learn.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"vision-digits has no split {split!r}.{did_you_mean(split, SPLITS)} It has:"
            f" {', '.join(SPLITS)}"
        )
    return Digits(split, DigitsOptions.parse(options))
