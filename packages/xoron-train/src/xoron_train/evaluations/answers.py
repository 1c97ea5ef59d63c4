"""How often a model answers right: its greedy answers against what conversations expect.

The last message of a conversation is the expected answer, what stands before it is the prompt. Its
text is what is expected; a message with `references`, a list of texts, expects any of those instead
(captions by several people, the ten answers to a VQA question). Scores of one answer:

    match  1 if equal to a reference after stripping, folding case and collapsing white space
    exact  1 if equal to a reference as it is
    vqa    the consensus accuracy of the VQA data sets (see `vqa`), from 0 to 1

Beside the score stand two figures to hold it against: chance, what always giving the answer that is
expected most often for a kind of question scores, and controls, what the model scores where media
are shuffled, zeroed or noised (see `interventions`). Without them a score says little: half of all
yes-or-no questions are answered right by a model that sees nothing.

The record:

    samples, score, chance  over all conversations
    cut                     answers that reached max_new_tokens; if there are many, raise it
    kinds                   by `Conversation.kind`, where there are any: samples, score, chance
    controls                by intervention, over the conversations whose media it replaces:
                            samples, score, kinds
    passed                  all gates, where there are any
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from xoron_core.errors import DataError
from xoron_core.sequence import Plan
from xoron_core.session import Reply, Session
from xoron_train.conversation import Conversation, has_media
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.comparison import share_interval
from xoron_train.evaluations.config import AnswersConfig, Intervention, Scoring
from xoron_train.evaluations.interventions import Interventions, judging, media_slots, naming
from xoron_train.evaluations.scores import (
    SCORES,
    Expected,
    Score,
    figures,
    majority,
    most_frequent,
    split,
)

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class Answers(Evaluation):
    """The evaluation `answers`."""

    config: AnswersConfig

    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """See `evaluate_answers`; with gates the record says whether they are passed."""
        names = ("score", "max_new_tokens", "controls", "slots", "batch_size", "seed")
        options = {name: getattr(self.config, name) for name in names}
        record = evaluate_answers(model, processor, samples, **options)
        return record | self._gates(record)

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """The score and that of each control, where there is a gate."""
        least, most = self.config.at_least, self.config.control_at_most
        found = [] if least is None else [_check("score", record, at_least=least)]
        if most is not None:
            found += [
                _check(f"score, {name}", control, at_most=most)
                for name, control in record["controls"].items()
            ]
        return found

    def suits(self, sample: Conversation) -> bool:
        """Whether it ends with text of the assistant."""
        last = sample.messages[-1]
        return last["role"] == "assistant" and (not has_media(last) or "references" in last)

    def _gates(self, record: Mapping[str, Any]) -> dict[str, bool]:
        if self.config.control_at_most is not None and not record["controls"]:
            raise DataError(
                "answers: control_at_most finds no control, because no conversation has media;"
                " remove it"
            )
        checks = self.checks(record)
        return {"passed": all(check.passed for check in checks)} if checks else {}


def evaluate_answers(
    model: XoronModel,
    processor: XoronProcessor,
    samples: Sequence[Conversation],
    *,
    score: Scoring = "match",
    max_new_tokens: int = 32,
    controls: Sequence[Intervention] | None = None,
    slots: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Asks every question and compares the greedy answers with the expected ones.

    Nothing of the model is changed, not its mode and not the random state of torch either.

    Args:
        model: on any device, in any mode.
        processor: of the model.
        samples: conversations that end with the expected answer. Each is read more than once.
        score: of an answer: `match`, `exact` or `vqa`.
        max_new_tokens: limit of an answer.
        controls: interventions under which the questions are asked again; None is `zeroed` where
            there are media.
        slots: encoders and codecs whose media those replace; empty for all.
        batch_size: questions at once.
        seed: of the controls.

    Returns:
        The record that this module describes, without `passed`.

    Raises:
        ConfigError: for a slot without an encoder or codec.
        DataError: if there are no samples, if one cannot be read or has no prompt, no expected
            text or too few references, or if a control finds no media.
    """
    if not samples:
        raise DataError("answers: there are no conversations to judge; expected one or more")

    def plan(index: int) -> Plan:
        with naming(samples[index]):
            return processor.plan(split(samples[index])[0], add_generation_prompt=True)

    shown = Interventions(model, processor, plan, slots=media_slots(model, slots), seed=seed)
    expected = [split(sample)[1] for sample in samples]
    ask = partial(_replies, shown, samples, size=batch_size, limit=max_new_tokens)
    way = SCORES[score]
    with judging(model, seed=seed):
        replies = ask(range(len(samples)))
        record = _beside_chance([reply.text for reply in replies], expected, way)
        record["cut"] = sum(reply.reason == "length" for reply in replies)
        shown.shuffle([majority(wanted.references, way) for wanted in expected])
        record["controls"] = {}
        usual: tuple[Intervention, ...] = ("zeroed",) if any(shown.media) else ()
        for name in usual if controls is None else controls:
            reached = _reached(shown, name)
            said = [reply.text for reply in ask(reached, control=name)]
            record["controls"][name] = figures(said, [expected[i] for i in reached], way)
    return record


def _replies(
    shown: Interventions,
    samples: Sequence[Conversation],
    indices: Sequence[int],
    *,
    size: int,
    limit: int,
    control: Intervention | None = None,
) -> list[Reply]:
    """Asks some samples' questions: all of them the first time, then under a control."""
    session = Session(shown.model, shown.processor)
    replies: list[Reply] = []
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        if control is None:
            shown.read(batch)
        with shown.observed() if control is None else shown.applied(control, batch):
            prompts = [split(samples[index])[0] for index in batch]
            replies += session.generate(prompts, max_new_tokens=limit)
    return replies


def _reached(shown: Interventions, control: Intervention) -> list[int]:
    """The samples whose media a control replaces.

    Raises:
        DataError: if there are none.
    """
    total = len(shown.media)
    if reached := [index for index in range(total) if shown.reaches(control, index)]:
        return reached
    raise DataError(
        f"answers: control {control!r} finds nothing to replace in {total} conversations; give some"
        " with media that an encoder or a codec reads (for shuffled: of the same length, and with"
        " different answers), or take it out of controls"
    )


def _beside_chance(said: Sequence[str], expected: Sequence[Expected], way: Score) -> dict[str, Any]:
    """The figures of answers, in all and by kind, with those of chance beside them."""
    record = figures(said, expected, way)
    chance = figures(most_frequent(expected, way), expected, way)
    record["chance"] = chance["score"]
    for kind, entry in record.get("kinds", {}).items():
        entry["chance"] = chance["kinds"][kind]["score"]
    return record


def _check(figure: str, record: Mapping[str, Any], **threshold: float) -> Check:
    score, number = record["score"], record["samples"]
    return Check(figure, score, number, interval=share_interval(score, number), **threshold)
