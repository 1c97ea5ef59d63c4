"""The splits of `vision-digits` as conversations.

- `train`: scans of some hands, warped at random; of all combinations of a digit or shape with a
  colour, five in six, and a share of scenes in grey. A conversation asks several questions, and
  each position of its image may be labelled with what lies there.
- `held-out`: scans of other hands, combinations as in training; one question each.
- `unseen`: scans of other hands, and every thing a combination that never stands in training.

Conversation i of a split is a pure function of (seed, split, i).

Footguns:
- What has been answered stands before the next question, so some of it can be answered from text.
- Things that were never seen in a colour can be told apart by it, without a look at their shape: a
  model that does so fails on `unseen`. Things in grey have nothing else than their shape.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from pydantic import Field, model_validator

from xoron_core.config import Config
from xoron_core.errors import ConfigError, did_you_mean
from xoron_train.conversation import HELD_OUT, TRAIN, Conversation
from xoron_train.tasks.digits.questions import ASKED, Question, ask, label
from xoron_train.tasks.digits.scans import scans
from xoron_train.tasks.digits.scenes import Scene, draw_scene, render

UNSEEN = "unseen"
SPLITS = (TRAIN, HELD_OUT, UNSEEN)
Taught = Literal["digit", "colour", "count", "side", "column"]


class DigitsOptions(Config):
    """Options of the data set.

    Attributes:
        seed: of all scenes.
        samples: how many conversations a split has.
        questions: kinds of `TAUGHT` that a training conversation asks about, in any order and as
            often as they stand here; fewer where a scene has not as many. With none, its labels
            alone are learned.
        grey: share of training scenes without colours.
        labelled: the image's positions in the model, if they are to be labelled in training: a
            square number, row by row; 0 labels nothing.
    """

    seed: int = Field(default=0, ge=0)
    samples: int = Field(default=1_000_000, ge=1)
    questions: tuple[Taught, ...] = get_args(Taught)
    grey: float = Field(default=0.5, ge=0, le=1)
    labelled: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if not (self.questions or self.labelled):
            raise ValueError("questions: [] with labelled: 0 leaves nothing to learn")
        # Two centres may be as near as 23 pixels, and at any place.
        if self.labelled and isqrt(self.labelled) ** 2 != self.labelled:
            raise ValueError(f"labelled: {self.labelled} is no square number, e.g. 16")
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
        image: dict[str, Any] = {"type": "image", "image": self.image(index, scene)}
        if self.split == TRAIN and self.options.labelled:
            columns = isqrt(self.options.labelled)
            image["labels"] = label(scene, self.rng(index, 2), columns=columns)
        messages: list[dict[str, Any]] = []
        for question in questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        if not questions:
            return Conversation(f"{self.split}-{index}", [{"role": "user", "content": [image]}])
        messages[0]["content"] = [image, {"type": "text", "text": questions[0].text}]
        kind = questions[0].kind if len(questions) == 1 else ""
        return Conversation(f"{self.split}-{index}", messages, kind)

    def draw(self, index: int) -> tuple[Scene, list[Question]]:
        """The scene and the questions behind conversation `index`."""
        rng = self.rng(index, 0)
        if self.split == TRAIN:
            grey = rng.random() < self.options.grey
            scene = draw_scene(rng, self.scans, unseen=False, grey=grey)
            return scene, self._several(scene, rng)
        kind = list(ASKED)[index % len(ASKED)]
        while True:
            scene = draw_scene(rng, self.scans, unseen=self.split == UNSEEN)
            question = ask(scene, kind, rng)
            if question is not None:
                return scene, [question]

    def image(self, index: int, scene: Scene) -> np.ndarray:
        """The image of conversation `index`: (64, 64, 3) uint8."""
        return render(scene, self.scans, self.rng(index, 1), varied=self.split == TRAIN)

    def rng(self, index: int, part: int) -> np.random.Generator:
        """Of one part of conversation `index`: 0 scene and questions, 1 image, 2 labels."""
        return np.random.default_rng((self.options.seed, SPLITS.index(self.split), index, part))

    def _several(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        """Questions of the kinds that are taught, none twice."""
        found: dict[str, Question] = {}
        for kind in rng.permutation(self.options.questions):
            if question := ask(scene, kind, rng):
                found.setdefault(question.text, question)
        if self.options.questions and not found:
            # A scene always has things to count.
            found["count"] = cast(Question, ask(scene, "count", rng))
        return list(found.values())


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
