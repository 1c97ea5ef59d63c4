"""What an answer is worth, in all and by kind of question, and what chance is worth. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xoron_core.errors import DataError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import vqa
from xoron_train.evaluations.config import Scoring


class Expected(NamedTuple):
    """What the conversation of a name expects.

    Attributes:
        name: of the conversation.
        kind: of question; may be empty.
        references: texts, one or more, each of which is an answer.
    """

    name: str
    kind: str
    references: list[str]


class Score(NamedTuple):
    """A way to compare answers.

    Attributes:
        key: equal for answers that are the same.
        worth: of an answer beside references, in [0, 1].
    """

    key: Callable[[str], str]
    worth: Callable[[str, Sequence[str]], float]


def split(sample: Conversation) -> tuple[list[dict[str, Any]], Expected]:
    """A conversation's prompt, and what is expected behind it.

    Raises:
        DataError: if it does not end with an assistant's text behind a prompt.
    """
    *prompt, last = sample.messages or [{}]
    text = _text(last.get("content"))
    references: Any = last.get("references") or ([text] if text.strip() else None)
    texts = isinstance(references, list) and all(isinstance(r, str) for r in references)
    if not prompt or last.get("role") != "assistant" or not texts:
        raise DataError(
            f"conversation {sample.name!r}: expected a prompt and then an assistant's message, with"
            f" text or with `references` (a list of texts); got {len(prompt)} messages and then one"
            f" by {last.get('role')!r} with content {str(last.get('content'))[:80]!r}"
        )
    return prompt, Expected(sample.name, sample.kind, references)


def normalise(text: str) -> str:
    """Stripped, case folded, white space collapsed."""
    return " ".join(text.split()).casefold()


SCORES: dict[Scoring, Score] = {
    "match": Score(normalise, lambda said, known: float(normalise(said) in map(normalise, known))),
    "exact": Score(str, lambda said, known: float(said in known)),
    "vqa": Score(vqa.normalise, vqa.vqa_accuracy),
}


def figures(said: Sequence[str], expected: Sequence[Expected], score: Score) -> dict[str, Any]:
    """Number and mean score of answers, in all and, under `kinds`, by kind where there are any.

    Raises:
        DataError: for references that the score cannot do with.
    """
    worth: dict[str, list[float]] = {}
    for text, wanted in zip(said, expected, strict=True):
        try:
            worth.setdefault(wanted.kind, []).append(score.worth(text, wanted.references))
        except DataError as error:
            raise DataError(f"conversation {wanted.name!r}: {error}") from None

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return {"samples": len(values), "score": sum(values) / len(values)}

    record = mean([value for values in worth.values() for value in values])
    if set(worth) != {""}:
        record["kinds"] = {kind: mean(values) for kind, values in sorted(worth.items())}
    return record


def most_frequent(expected: Sequence[Expected], score: Score) -> list[str]:
    """For each question the answer that is expected most often for its kind."""
    votes: dict[str, list[str]] = {}
    for wanted in expected:
        votes.setdefault(wanted.kind, []).extend(wanted.references)
    best = {kind: majority(references, score) for kind, references in votes.items()}
    return [best[wanted.kind] for wanted in expected]


def majority(references: Sequence[str], score: Score) -> str:
    """What most of the references say, as `score` compares them; of several the first by name."""
    votes = Counter(map(score.key, references))
    return max(sorted(votes), key=votes.__getitem__)


def _text(content: Any) -> str:
    """The text of a message's content; empty if it holds anything else."""
    if isinstance(content, str):
        return content
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content or ()]
    plain = all(part.get("type") == "text" for part in parts)
    return "".join(part["text"] for part in parts) if plain else ""
