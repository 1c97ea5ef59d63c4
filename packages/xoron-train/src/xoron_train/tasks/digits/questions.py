"""What can be asked of a scene, with answers computed from it.

A question is asked only where it has one answer: "the 7" needs exactly one 7, "which digit is red"
exactly one red digit. How many there are is balanced by weighing rare answers more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from xoron_train.tasks.digits.scenes import COLOURS, IMAGE_SIZE, Scene, Thing

# How often an answer to "how many" is chosen where there is a choice.
_COUNT_WEIGHTS = {"0": 1.0, "1": 1.0, "2": 2.5, "3": 5.0}


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        kind: of `TAUGHT`.
        text: what is asked.
        answer: what is expected.
    """

    kind: str
    text: str
    answer: str


def digit_questions(scene: Scene) -> list[Question]:
    """Which digit it is, by its colour, or the only one."""
    digits = [thing for thing in scene if thing.is_digit]
    found = []
    if len(digits) == 1:
        found.append(Question("digit", "Which digit is there?", digits[0].kind))
    colours = [thing.colour for thing in digits]
    for thing in digits:
        if thing.colour in COLOURS and colours.count(thing.colour) == 1:
            found.append(Question("digit", f"Which digit is {thing.colour}?", thing.kind))
    return found


def colour_questions(scene: Scene) -> list[Question]:
    """The colour of what is there once."""
    kinds = [thing.kind for thing in scene]
    return [
        Question("colour", f"What colour is the {thing.kind}?", thing.colour)
        for thing in scene
        if thing.colour in COLOURS and kinds.count(thing.kind) == 1
    ]


def count_questions(scene: Scene) -> list[Question]:
    """How many digits, shapes, or things of a colour, which may be none."""
    digits = sum(thing.is_digit for thing in scene)
    counts = {"digits": digits, "shapes": len(scene) - digits}
    colours = [thing.colour for thing in scene]
    counts |= {f"{colour} things": colours.count(colour) for colour in COLOURS}
    return [Question("count", f"How many {of}?", str(n)) for of, n in counts.items()]


def side_questions(scene: Scene) -> list[Question]:
    """Left or right, between two things of which each is there once."""
    kinds = [thing.kind for thing in scene]
    single = [thing for thing in scene if kinds.count(thing.kind) == 1]
    return [
        Question(
            "side",
            f"Is the {a.kind} left or right of the {b.kind}?",
            "left" if a.center < b.center else "right",
        )
        for a, b in permutations(single, 2)
    ]


def column_of(thing: Thing) -> str:
    """Which eighth of the image its centre is in: `a`, at the left, to `h`."""
    return "abcdefgh"[int(thing.center * 8 / IMAGE_SIZE)]


def column_questions(scene: Scene) -> list[Question]:
    """Where a thing is that is there once: a letter from `a`, at the left, to `h`. Not judged."""
    kinds = [thing.kind for thing in scene]
    return [
        Question("column", f"Which column is the {thing.kind} in?", column_of(thing))
        for thing in scene
        if kinds.count(thing.kind) == 1
    ]


ASKED = {
    "digit": digit_questions,
    "colour": colour_questions,
    "count": count_questions,
    "side": side_questions,
}
# What a training conversation may ask.
TAUGHT = {**ASKED, "column": column_questions}


def label(scene: Scene, rng: np.random.Generator, *, columns: int) -> list[str]:
    """What lies in each square of a grid, row by row: a thing's kind, colour or column, at random.

    A thing lies where its centre is; elsewhere there is a dot. With these as the labels of an
    image's positions, things are recognised after far fewer images than from questions alone. The
    kind, of which there are most, is said twice as often as the others.

    Args:
        scene: without two things in one square.
        rng: of this image alone.
        columns: of the grid, as many as rows.
    """
    labels = ["."] * columns**2
    for thing in scene:
        row, column = (
            int((start + thing.side / 2) * columns / IMAGE_SIZE) for start in (thing.y, thing.x)
        )
        said = [thing.kind, thing.kind, thing.colour, column_of(thing)]
        if thing.colour not in COLOURS:
            said[2] = thing.kind
        labels[row * columns + column] = said[rng.integers(len(said))]
    return labels


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draws one of the questions of a kind of `TAUGHT`, or None where the scene has none."""
    found = TAUGHT[kind](scene)
    if not found:
        return None
    if kind != "count":
        return found[rng.integers(len(found))]
    answers = sorted({question.answer for question in found})
    weights = np.array([_COUNT_WEIGHTS[answer] for answer in answers])
    answer = rng.choice(answers, p=weights / weights.sum())
    of_it = [question for question in found if question.answer == answer]
    return of_it[rng.integers(len(of_it))]
