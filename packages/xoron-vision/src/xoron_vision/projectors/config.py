"""Configs of the projectors. Imports no torch.

`hidden_size` is always a projector's own inner width; what it writes is as wide as the backbone, or
as `output_size` where there is none (None: as wide as its features).
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import PositiveInt, model_validator

from xoron_core.config import Config


class ProjectorConfig(Config):
    """What every projector has.

    Attributes:
        output_size: width of its results in a composition without a backbone.
    """

    output_size: PositiveInt | None = None


class MlpConfig(ProjectorConfig):
    """Each feature on its own through two layers (LLaVA 1.5; Liu et al. 2023).

    Attributes:
        hidden_size: inner width; None is the width of the result.
    """

    hidden_size: PositiveInt | None = None


class GroupConfig(MlpConfig):
    """Squares of neighbouring patches become one position each.

    Attributes:
        factor: side of a square; the sides of every image's grid must be multiples of it.
    """

    factor: PositiveInt = 2


class CAbstractorConfig(ProjectorConfig):
    """Convolutions, pooling to a square grid, convolutions (Honeybee; Cha et al. 2024).

    Attributes:
        num_tokens: positions per image, a square number.
        hidden_size: width of the convolutions.
        depth: residual blocks before the pooling, and as many behind it.
    """

    num_tokens: PositiveInt = 64
    hidden_size: PositiveInt = 1024
    depth: PositiveInt = 3

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
            raise ValueError(f"num_tokens {self.num_tokens} is no square number, e.g. 64 or 144")
        return self


class BudgetConfig(ProjectorConfig):
    """A resampler whose first latents can do without the later ones.

    Attributes:
        num_tokens: latents, and positions per image where no budget says less.
        budgets: how many positions a training run draws from, e.g. [16, 32, 64].
        budget: positions per image of this model; None is num_tokens.
    """

    num_tokens: PositiveInt = 64
    budgets: tuple[PositiveInt, ...] = ()
    budget: PositiveInt | None = None

    @model_validator(mode="after")
    def _within_tokens(self) -> Self:
        for count in (*self.budgets, self.budget or 1):
            if count > self.num_tokens:
                raise ValueError(f"a budget of {count} is more than num_tokens {self.num_tokens}")
        return self


class PerceiverConfig(BudgetConfig):
    """Latents attend to [features, latents], then one linear layer.

    With `budgets` latents see only those before them, so that a prefix is the same numbers whether
    the rest is computed or not; without, all of them (as Idefics2), and a smaller `budget` is an
    approximation.

    Attributes:
        hidden_size: width of the latents; None is that of the features.
        num_layers: how many layers.
        num_heads: of each.
        head_dim: width of a head; None is hidden_size / num_heads.
    """

    hidden_size: PositiveInt | None = None
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 8
    head_dim: PositiveInt | None = None


class PerceiverMlpConfig(BudgetConfig):
    """The connector of Qwen3-VLM (Track A): resampler, then two wide layers.

    82,445,824 parameters between features of 1,152 and a backbone of 4,096.

    Attributes:
        hidden_size: width of the latents.
        num_layers: of the resampler.
        num_heads, head_dim: of its attention.
        mlp_size: inner width of the two layers; None is four times that of the result.
        vision_norm: a LayerNorm on the features (2,304 parameters; the published `vision_ln`).
    """

    hidden_size: PositiveInt = 512
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    mlp_size: PositiveInt | None = None
    vision_norm: bool = False
