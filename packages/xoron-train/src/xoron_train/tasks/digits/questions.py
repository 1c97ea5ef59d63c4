"""What can be asked of a scene, with answers computed from it.

A question is asked only where it has one answer: "the 7" needs exactly one 7, "which digit is red"
exactly one red digit. How many there are is balanced by weighing rare answers more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from xoron_train.tasks.digits.scenes import COLOURS, IMAGE_SIZE, Scene

DESCRIPTION = "What is there?"
_CELLS = 4
# How often an answer to "how many" is chosen where there is a choice.
_COUNT_WEIGHTS = {"0": 1.0, "1": 1.0, "2": 2.5, "3": 5.0}


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        kind: of `ASKED`.
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
        if colours.count(thing.colour) == 1:
            found.append(Question("digit", f"Which digit is {thing.colour}?", thing.kind))
    return found


def colour_questions(scene: Scene) -> list[Question]:
    """The colour of what is there once."""
    kinds = [thing.kind for thing in scene]
    return [
        Question("colour", f"What colour is the {thing.kind}?", thing.colour)
        for thing in scene
        if kinds.count(thing.kind) == 1
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


ASKED = {
    "digit": digit_questions,
    "colour": colour_questions,
    "count": count_questions,
    "side": side_questions,
}


def describe(scene: Scene) -> Question:
    """Everything, from left to right."""
    return Question("describe", DESCRIPTION, ", ".join(f"{t.colour} {t.kind}" for t in scene))


def draw_map(scene: Scene, rng: np.random.Generator) -> Question:
    """What is where, or which colour: a letter for each cell of a 4 by 4 grid, row by row.

    A cell belongs to the thing whose square covers its middle, `.` to none. Not judged: each letter
    stands as far from its cell in the sequence as every other, so it is read without searching, and
    that teaches what things look like. Two in three are of digits and shapes, the harder ones.
    """
    coloured = rng.random() < 1 / 3
    middles = (np.arange(_CELLS) + 0.5) * IMAGE_SIZE / _CELLS
    cells = np.full((_CELLS, _CELLS), ".")
    for thing in scene:
        down, across = (
            (start <= middles) & (middles < start + thing.side) for start in (thing.y, thing.x)
        )
        cells[np.ix_(down, across)] = (thing.colour if coloured else thing.kind)[0]
    text = "Map colours." if coloured else "Map it."
    return Question("map", text, "".join(cells.ravel()))


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draws one of the questions of a kind, or None where the scene has none."""
    found = ASKED[kind](scene)
    if not found:
        return None
    if kind != "count":
        return found[rng.integers(len(found))]
    answers = sorted({question.answer for question in found})
    weights = np.array([_COUNT_WEIGHTS[answer] for answer in answers])
    answer = rng.choice(answers, p=weights / weights.sum())
    of_it = [question for question in found if question.answer == answer]
    return of_it[rng.integers(len(of_it))]
