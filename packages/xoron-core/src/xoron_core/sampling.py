"""Which rows may be decoded, and the sampling steps shared by `generate` and `Session`.

A row that a request does not allow (a media begin marker, a codec id, a hole) is masked before any
choice: an untrained row must not win an argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xoron_core.config import Config
from xoron_core.errors import ConfigError
from xoron_core.tokens.space import TokenSpace

# Never part of an answer: padding, begin of text, the markers that open a turn, and media markers.
_NEVER = {"bos", "pad", "system_start", "user_start", "assistant_start"}
_MEDIA_GROUPS = ("xoron-core/multimodal",)


class Choice(Config):
    """How one id is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k best, 0 for all.
        top_p: keep the smallest set with this probability mass, 1 for all.
        min_p: keep what has at least this share of the best one's probability, 0 for all (Nguyen
            et al. 2024).
        repetition_penalty: above 1 makes ids that stand in the prompt or the answer less likely,
            below 1 more (Keskar et al. 2019); also when greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def model_post_init(self, _: object) -> None:
        """Refuses values outside their ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature}: expected 0 or more; 0 is greedy")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k}: expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}: expected a share in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p {self.min_p}: expected a share in [0, 1]; 0 keeps all")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"repetition_penalty {self.repetition_penalty}: expected more than 0; 1 changes"
                " nothing"
            )

    def warpers(self) -> LogitsProcessorList:
        """transformers' own processors for these settings, in its order.

        They take the ids so far and scores that are masked already. Greedy decoding ignores all but
        the penalty.
        """
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0:
            return processors
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors


class Sampling(Choice):
    """How a request's ids are chosen: those of text, and of media where nothing else is said.

    Attributes:
        seed: for the draws; None takes a fresh one.
        vary_rows: whether each row of a batch draws under a seed of its own, the first one's plus
            its index. Else all draw alike, so that a conversation gets the same alone.
        modalities: settings for the ids inside the spans of a modality. They replace the others
            whole: a repetition penalty for text is none for codes, which often repeat.
    """

    seed: int | None = None
    vary_rows: bool = False
    modalities: dict[str, Choice] = Field(default_factory=dict)

    def of(self, modality: str | None) -> Choice:
        """What holds inside spans of a modality, or in text (None)."""
        return self if modality is None else self.modalities.get(modality, self)


class AllowedRows(LogitsProcessor):
    """Masks every row of the logits that is not allowed; rows beyond the mask are not allowed.

    Args:
        allowed: (V,) bool.
    """

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, N) ids and (B, V) scores to (B, V) scores."""
        allowed = self.allowed.to(scores.device)
        extra = scores.shape[-1] - allowed.numel()
        if extra:
            allowed = torch.cat([allowed, allowed.new_zeros(extra)])
        return scores.masked_fill(~allowed, float("-inf"))


def text_rows(space: TokenSpace) -> Tensor:
    """(V,) bool: the rows a text answer may hold: the text base and the special tokens of groups
    that belong to text, without media markers, padding and turn openers."""
    allowed = torch.zeros(space.size, dtype=torch.bool)
    allowed[: space.text_size] = True
    for special in space:
        text = special.group.startswith("xoron-core/") and special.group not in _MEDIA_GROUPS
        if special.alias:
            # A string of the base stays as free as the base has it, unless it marks media here.
            allowed[special.id] &= text
        else:
            allowed[special.id] = text and special.name not in _NEVER
    return allowed


def draw(scores: Tensor, generators: Sequence[torch.Generator | None] | None) -> Tensor:
    """Chooses one id per row: (B, V) scores to (B,) ids.

    Args:
        scores: processed logits.
        generators: one per row, so that a row's draws do not depend on its neighbours; None is
            greedy, for a row or for all.
    """
    if generators is None:
        return scores.argmax(-1)
    probabilities = scores.float().softmax(-1)
    picks = [
        row.argmax(-1, keepdim=True)
        if generator is None
        else torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(picks)
