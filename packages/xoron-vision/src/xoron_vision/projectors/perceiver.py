"""Projectors with latents: `perceiver`, and `perceiver-mlp` of Track A; both with nested budgets.

A budget is how many positions an image takes. It is decided where a sequence is laid out
(`XoronProcessor.budgets`, or `budget` in the config): drawn in a forward pass it would change the
length of the sequence. The forward pass is told, `counts`, and runs no more latents than needed.
To train for several budgets, draw one per batch from `config.budgets` with a generator of your own
and set it in the processor; nothing here draws random numbers.

Shapes: M images, L features, E their width, K latents, D backbone width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xoron_core.components import Context, Features
from xoron_core.errors import SequenceError
from xoron_core.nn.resampler import CrossAttentionResampler, PerceiverResampler
from xoron_vision.projectors.base import SizedProjector, two_layers
from xoron_vision.projectors.config import BudgetConfig, PerceiverConfig, PerceiverMlpConfig


class LatentProjector(SizedProjector):
    """Runs the first latents, as many as the budget; children have `resampler` and `write`."""

    budgeted = True
    config: BudgetConfig
    resampler: nn.Module
    write: nn.Module

    def forward(self, features: Features, *, counts: Tensor | None = None) -> Features:
        """(M, L, E) to (M, K, D).

        Args:
            features: of an encoder.
            counts: (M,) int64, positions of each image; None is the config's budget for all.

        Raises:
            SequenceError: for a count below 1 or above the latents there are.
        """
        M, most = len(features.values), self.num_positions(self.config, 0)
        if counts is not None and counts.numel() and not counts.is_meta:
            most = int(counts.max())
            if int(counts.min()) < 1 or most > self.config.num_tokens:
                raise SequenceError(
                    f"slot {self.slot!r}: an image of {most} positions; this projector makes 1 to"
                    f" {self.config.num_tokens}"
                )
        latents = self.resampler(self.read(features.values), features.mask, num_latents=most)
        values = self.write(latents)
        if counts is None:
            counts = torch.full((M,), most, device=values.device)
        return Features(values, torch.arange(most, device=values.device) < counts[:, None])

    def read(self, values: Tensor) -> Tensor:
        """(M, L, E) as the resampler takes it."""
        return values

    @classmethod
    def num_positions(cls, config: BudgetConfig, num_features: int) -> int:
        """The budget, whatever the number of features."""
        return config.budget or config.num_tokens


class PerceiverProjector(LatentProjector):
    """Perceiver resampler (general form), then a linear layer."""

    def __init__(self, config: PerceiverConfig, context: Context) -> None:
        super().__init__(config, context)
        width = config.hidden_size or self.feature_size
        self.resampler = PerceiverResampler(
            self.feature_size,
            width,
            num_latents=config.num_tokens,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            nested=bool(config.budgets),
        )
        self.write = nn.Linear(width, self.output_size)


class PerceiverMlpProjector(LatentProjector):
    """The published connector of Track A: cross-attention resampler, then two wide layers."""

    def __init__(self, config: PerceiverMlpConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vision_norm = nn.LayerNorm(self.feature_size) if config.vision_norm else None
        self.resampler = CrossAttentionResampler(
            self.feature_size,
            config.hidden_size,
            num_latents=config.num_tokens,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
        )
        inner = config.mlp_size or 4 * self.output_size
        self.write = two_layers(config.hidden_size, inner, self.output_size)

    def read(self, values: Tensor) -> Tensor:
        """Normalised, where the config says so."""
        return values if self.vision_norm is None else self.vision_norm(values)
