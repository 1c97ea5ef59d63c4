"""The consensus accuracy of the VQA data sets (Antol et al. 2015), and its answer normalisation.

An answer is as right as people agree with it: min(1, matches / 3) over the references, averaged
over all subsets that leave one reference out, so that a person is never judged by herself.

`normalise` does what the authors' evaluation script does to a model's answer. Two differences:
- The script strips only punctuation from references, because those of its data sets are stored
  without articles and number words. Here references go through the same `normalise`.
- Entries of its table of contractions that change nothing, or can never match a word in lower case,
  are left out (`let's`, `she's`, `Im`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xoron_core.errors import DataError

MIN_REFERENCES = 4  # with fewer, an answer that all agree with cannot reach 1

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_DIGITS.split())}
_ARTICLES = frozenset({"a", "an", "the"})

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {
    written: word for word in _CONTRACTED.split() for written in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}  # so in the script


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it.

    White space is collapsed and case folded; punctuation, but for apostrophes, colons and decimal
    points, goes; number words up to ten become digits; articles go; lost apostrophes of
    contractions come back.
    """
    words = _without_punctuation(" ".join(answer.split())).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The consensus accuracy of one answer, in [0, 1].

    Args:
        answer: what the model said.
        references: what people said, usually ten of them; equal ones stand as often as they were
            given.

    Raises:
        DataError: if there are fewer than 4.
    """
    if len(references) < MIN_REFERENCES:
        raise DataError(
            f"VQA accuracy needs {MIN_REFERENCES} references or more (the data sets have 10), got"
            f" {len(references)}; give them as `references` of the expected answer, or use"
            " score: match"
        )
    said = normalise(answer)
    total, matches = len(references), [normalise(r) for r in references].count(said)
    left_in = min(1.0, matches / 3)  # where somebody who said something else is left out
    left_out = min(1.0, (matches - 1) / 3)
    return ((total - matches) * left_in + matches * left_out) / total


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, one between letters becomes a space.

    In a text with a comma between digits every mark goes: `1,000` is a number.
    """
    number = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if number or beside_space else " ")
    # The script passes re.UNICODE, which is 32, where the number of replacements stands.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)
