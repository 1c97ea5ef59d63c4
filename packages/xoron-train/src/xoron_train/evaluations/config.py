"""Configs of the evaluations `seeing` and `answers`. Light: no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from xoron_core.config import Config
from xoron_train.evaluations.base import EvaluationConfig

Intervention = Literal["shuffled", "zeroed", "noised"]
Scoring = Literal["match", "exact", "vqa"]


class Gate(Config):
    """What a model that sees must at least reach.

    Attributes:
        delta: nats that the expected answer must lose without the correct media.
        wins: share of the samples whose correct loss is the lower one; ties count half.
    """

    delta: float = 0.10
    wins: float = Field(default=0.80, ge=0, le=1)


class SeeingConfig(EvaluationConfig):
    """See `xoron_train.evaluations.seeing`.

    Attributes:
        slots: encoders whose features are replaced; empty for all.
        shuffled, zeroed, noised: gate on each comparison; null only reports it.
        seed: of who gets whose features, of the noise and of the interval.
    """

    slots: tuple[str, ...] = ()
    shuffled: Gate | None = Gate()
    zeroed: Gate | None = None
    noised: Gate | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_a_gate(self) -> Self:
        if self.required and not (self.shuffled or self.zeroed or self.noised):
            raise ValueError("required: true needs a gate: set shuffled, zeroed or noised")
        return self


class AnswersConfig(EvaluationConfig):
    """See `xoron_train.evaluations.answers`.

    Attributes:
        score: `match` compares after stripping, folding case and collapsing white space, `exact`
            as it is; `vqa` is the consensus accuracy of the VQA data sets.
        max_new_tokens: limit of an answer.
        controls: interventions on the media under which the questions are asked again; null is
            `[zeroed]` where there are media.
        slots: encoders whose features those replace; empty for all.
        at_least: score that passes; null for no such gate.
        control_at_most: the most that any control may score; null for no such gate.
        seed: of the controls.
    """

    score: Scoring = "match"
    max_new_tokens: int = Field(default=32, ge=1)
    controls: tuple[Intervention, ...] | None = None
    slots: tuple[str, ...] = ()
    at_least: float | None = Field(default=None, ge=0, le=1)
    control_at_most: float | None = Field(default=None, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _gates_fit(self) -> Self:
        if self.required and self.at_least is None and self.control_at_most is None:
            raise ValueError("required: true needs a gate: set at_least or control_at_most")
        if self.control_at_most is not None and self.controls == ():
            raise ValueError("control_at_most needs a control: leave controls out, or name one")
        return self
