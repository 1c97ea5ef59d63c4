"""Is what a model makes legal, and does it decode? Its own answers, media included.

A conversation's last message says what is to be made: media of a modality, or text. The model is
asked for that with its grammar on, as a session answers a user, and then

- every answer is read as a whole sequence by `SpanGrammar`, which shares no state with the decoding
  loop: an answer with an id that may not stand where it stands is *out of range*;
- every span of an answer must have become a medium, whose numbers are finite: it *decodes*;
- the model reads its own answer, and where an id inside a medium follows it is asked which of *all*
  ids it holds for the best: the share of those that the grammar forbids is *unguided*. That is no
  fault, since decoding never takes them; it says how much the model leans on the grammar.

Answers that are asked for media begin with them, so that every one holds a medium.

The record:

    samples       answers
    made          by modality, `text` for those without media: how many were asked for
    out_of_range  share of the answers that break the grammar
    decoded       share of the answers with media whose media all decode; absent without media
    unguided      share of the ids inside media; absent without media
    ids           inside media
    faults        the first few answers that are out of range or do not decode, in words
    passed        all gates, where there are any
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xoron_core.errors import DataError
from xoron_core.sampling import Sampling
from xoron_core.sequence import media_parts
from xoron_train.conversation import Conversation
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.comparison import share_interval
from xoron_train.evaluations.config import MakingConfig
from xoron_train.evaluations.interventions import judging, naming
from xoron_train.evaluations.made_answers import Answer, Maker

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

TEXT = "text"
_SHOWN_FAULTS = 5


class Making(Evaluation):
    """The evaluation `making`."""

    config: MakingConfig

    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """See `evaluate_making`; with gates the record says whether they are passed."""
        config = self.config
        record = evaluate_making(
            model,
            processor,
            samples,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
                vary_rows=True,
            ),
            frames=config.frames,
            batch_size=config.batch_size,
        )
        checks = self.checks(record)
        return record | ({"passed": all(check.passed for check in checks)} if checks else {})

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """Each of the three shares that has a gate.

        Raises:
            DataError: if a gate is about media, and none were asked for.
        """
        config = self.config
        found = []
        if (most := config.out_of_range_at_most) is not None:
            found.append(_check("out of range", record, at_most=most))
        if (least := config.decoded_at_least) is not None:
            found.append(_check("decoded", record, at_least=least))
        if (most := config.unguided_at_most) is not None:
            found.append(_check("unguided", record, at_most=most))
        return found

    def suits(self, sample: Conversation) -> bool:
        """Whether it ends with the assistant, behind a prompt."""
        return len(sample.messages) > 1 and sample.messages[-1]["role"] == "assistant"


def evaluate_making(
    model: XoronModel,
    processor: XoronProcessor,
    samples: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    frames: Mapping[str, int] | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Lets a model answer and examines what it made.

    Nothing of the model is changed, not its mode and not the random state of torch either.

    Args:
        model: on any device, in any mode.
        processor: of the model.
        samples: conversations that end with what is to be made.
        max_new_tokens: limit of an answer; an open medium is finished beyond it.
        sampling: greedy by default. A seed is counted on from batch to batch; with `vary_rows` no
            two answers draw alike.
        frames: modality to exactly how many frames a codec is to make of it.
        batch_size: answers at once.

    Returns:
        The record that this module describes, without `passed`.

    Raises:
        DataError: if there are no samples, or one does not end with a prompt and an answer.
        PluginError: for media that no codec of the model makes.
    """
    if not samples:
        raise DataError("making: there are no conversations to judge; expected one or more")
    asked: dict[str | None, list[Conversation]] = {}
    for sample in samples:
        asked.setdefault(_wanted(processor, sample), []).append(sample)
    sampling = sampling or Sampling()
    answers: list[Answer] = []
    with judging(model, seed=0):
        for target, those in asked.items():
            maker = Maker(model, processor, target, frames=frames or {}, limit=max_new_tokens)
            for start in range(0, len(those), batch_size):
                seed = None if sampling.seed is None else sampling.seed + start
                of_batch = sampling.model_copy(update={"seed": seed})
                answers += maker.make(those[start : start + batch_size], of_batch)
    return _record(answers)


def _wanted(processor: XoronProcessor, sample: Conversation) -> str | None:
    """The modality that a conversation ends with, None for text.

    Raises:
        DataError: if it has no prompt, or does not end with the assistant.
    """
    *prompt, last = sample.messages or [{}]
    if not prompt or last.get("role") != "assistant":
        raise DataError(
            f"conversation {sample.name!r}: expected a prompt and then an assistant's message that"
            f" holds what is to be made; got {len(prompt)} messages and then one by"
            f" {last.get('role')!r}"
        )
    with naming(sample):
        found = media_parts([last], processor.modalities)
    return found[0].modality if found else None


def _record(answers: Sequence[Answer]) -> dict[str, Any]:
    faults = [answer for answer in answers if answer.fault]
    media = [answer for answer in answers if answer.target is not None]
    broken = [answer for answer in media if answer.trouble]
    record: dict[str, Any] = {
        "samples": len(answers),
        "made": dict(Counter(answer.target or TEXT for answer in answers)),
        "out_of_range": len(faults) / len(answers),
    }
    if media:
        inside = sum(answer.inside for answer in media)
        record["decoded"] = 1 - len(broken) / len(media)
        record["unguided"] = sum(answer.unguided for answer in media) / max(1, inside)
        record["ids"] = inside
    shown = [*faults, *(answer for answer in broken if not answer.fault)][:_SHOWN_FAULTS]
    record["faults"] = [f"{answer.sample}: {answer.fault or answer.trouble}" for answer in shown]
    return record


def _check(figure: str, record: Mapping[str, Any], **threshold: float) -> Check:
    media = sum(number for target, number in record["made"].items() if target != TEXT)
    number = record["samples"] if figure == "out of range" else media
    if not number:
        raise DataError(
            f"making: {figure!r} is about media, and no conversation ends with any; give some that"
            " do, or set its gate to null"
        )
    value = record[figure.replace(" ", "_")]
    return Check(figure, value, number, interval=share_interval(value, number), **threshold)
