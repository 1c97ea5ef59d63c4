"""What can be answered without looking: the measure that seeing must beat."""

from __future__ import annotations

from collections import Counter, defaultdict

from xoron_train.conversation import TRAIN
from xoron_train.tasks.digits.dataset import Digits, digits
from xoron_train.tasks.digits.questions import ASKED, Question, ask

_ALL = "all"


class Guesses:
    """The most frequent answers in training, to each kind of question and to each text.

    Args:
        samples: how many training images to count in; every kind of question is asked of each.
        seed: of the data set.
    """

    def __init__(self, *, samples: int = 5000, seed: int = 0) -> None:
        train = digits(TRAIN, seed=seed, grey=0.0)
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        texts: dict[str, Counter[str]] = defaultdict(Counter)
        for index in range(samples):
            scene, rng = train.draw(index)[0], train.rng(index, 3)
            for question in filter(None, (ask(scene, kind, rng) for kind in ASKED)):
                kinds[question.kind][question.answer] += 1
                texts[question.text][question.answer] += 1
        self._by_kind = {kind: _first(answers) for kind, answers in kinds.items()}
        self._by_text = {text: _first(answers) for text, answers in texts.items()}

    def scores(
        self, split: Digits, *, samples: int = 1000
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of right guesses, in all (`all`) and by kind of question.

        Returns:
            Those of the most frequent answer to each kind (the chance level), and those of the most
            frequent answer to each text, which knows of the question all that can be known.
        """
        asked = [question for index in range(samples) for question in split.draw(index)[1]]
        return (
            _shares(asked, [self._by_kind[question.kind] for question in asked]),
            _shares(asked, [self._answer(question) for question in asked]),
        )

    def _answer(self, question: Question) -> str:
        return self._by_text.get(question.text, self._by_kind[question.kind])


def _first(answers: Counter[str]) -> str:
    # Ties by name, so that the result does not depend on the order of counting.
    return min(answers, key=lambda answer: (-answers[answer], answer))


def _shares(asked: list[Question], guesses: list[str]) -> dict[str, float]:
    right: dict[str, list[bool]] = defaultdict(list)
    for question, guess in zip(asked, guesses, strict=True):
        right[_ALL].append(guess == question.answer)
        right[question.kind].append(guess == question.answer)
    return {kind: sum(found) / len(found) for kind, found in right.items()}
