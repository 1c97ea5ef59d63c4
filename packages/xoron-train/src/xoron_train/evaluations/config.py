"""Configs of the evaluations. Light: no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

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
        slots: encoders and codecs whose media are replaced; empty for all.
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
        slots: encoders and codecs whose media those replace; empty for all.
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


class MakingConfig(EvaluationConfig):
    """See `xoron_train.evaluations.making`.

    Attributes:
        max_new_tokens: limit of an answer; an open medium is finished beyond it.
        temperature: 0 is greedy.
        top_k: keep the k best, 0 for all.
        frames: modality to exactly how many frames a codec is to make of it.
        out_of_range_at_most: share of the answers that may break the grammar; null reports it.
        decoded_at_least: share of the answers with media whose media all decode; null reports it.
        unguided_at_most: share of the ids inside media that the model alone, without the grammar,
            would have put outside of it; null reports it.
        seed: of the sampling.
    """

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    frames: dict[str, PositiveInt] = Field(default_factory=dict)
    out_of_range_at_most: float | None = Field(default=0.0, ge=0, le=1)
    decoded_at_least: float | None = Field(default=1.0, ge=0, le=1)
    unguided_at_most: float | None = Field(default=None, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_a_gate(self) -> Self:
        gates = (self.out_of_range_at_most, self.decoded_at_least, self.unguided_at_most)
        if self.required and gates == (None, None, None):
            raise ValueError("required: true needs a gate: set decoded_at_least or another")
        return self


class PromptingConfig(EvaluationConfig):
    """See `xoron_train.evaluations.prompting`.

    Attributes:
        shuffled: gate on the comparison; null only reports it.
        seed: of who gets whose prompt and of the interval.
    """

    shuffled: Gate | None = Gate(delta=0.0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_a_gate(self) -> Self:
        if self.required and self.shuffled is None:
            raise ValueError("required: true needs a gate: set shuffled")
        return self


class TextUnchangedConfig(EvaluationConfig):
    """See `xoron_train.evaluations.text_unchanged`.

    Attributes:
        base: folder of the text model: one of ours, or a causal language model of transformers.
        max_length: ids of a prompt; a longer one is cut.
        at_most: how far logits may lie apart; null only reports it.
    """

    base: str | None = None
    max_length: int = Field(default=64, ge=1)
    at_most: float | None = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _has_a_gate(self) -> Self:
        if self.required and self.at_most is None:
            raise ValueError("required: true needs a gate: set at_most")
        return self
