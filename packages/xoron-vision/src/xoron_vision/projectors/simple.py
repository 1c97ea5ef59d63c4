"""Projectors without attention: `mlp`, `pixel-shuffle` and `spatial`.

Shapes: M images, L features, E their width, D backbone width, r side of a square, K squares.
"""

from __future__ import annotations

from einops import rearrange, reduce

from xoron_core.components import Context, Features
from xoron_vision.projectors.base import SizedProjector, check_divides, squares, two_layers
from xoron_vision.projectors.config import GroupConfig, MlpConfig


class MlpProjector(SizedProjector):
    """Every feature becomes one position."""

    def __init__(self, config: MlpConfig, context: Context) -> None:
        super().__init__(config, context)
        inner = config.hidden_size or self.output_size
        self.mlp = two_layers(self.feature_size, inner, self.output_size)

    def forward(self, features: Features) -> Features:
        """(M, L, E) to (M, L, D), positions kept."""
        return features._replace(values=self.mlp(features.values))

    @classmethod
    def num_positions(cls, config: MlpConfig, num_features: int) -> int:
        """As many as features."""
        return num_features


class PixelShuffleProjector(SizedProjector):
    """The features of a square lie side by side in one position (as in InternVL, Chen et al. 2024).

    Nothing is lost before the first layer, which reads r * r * E numbers.
    """

    config: GroupConfig

    def __init__(self, config: GroupConfig, context: Context) -> None:
        super().__init__(config, context)
        inner = config.hidden_size or self.output_size
        self.mlp = two_layers(config.factor**2 * self.feature_size, inner, self.output_size)

    def forward(self, features: Features) -> Features:
        """(M, L, E) to (M, K, D)."""
        values, mask = squares(features, self.slot, self.config.factor)
        return Features(self.mlp(rearrange(values, "m k c e -> m k (c e)")), mask)

    @classmethod
    def num_positions(cls, config: GroupConfig, num_features: int) -> int:
        """One per square."""
        return check_divides(config.factor, num_features)


class SpatialProjector(SizedProjector):
    """The mean of a square becomes one position."""

    config: GroupConfig

    def __init__(self, config: GroupConfig, context: Context) -> None:
        super().__init__(config, context)
        inner = config.hidden_size or self.output_size
        self.mlp = two_layers(self.feature_size, inner, self.output_size)

    def forward(self, features: Features) -> Features:
        """(M, L, E) to (M, K, D)."""
        values, mask = squares(features, self.slot, self.config.factor)
        return Features(self.mlp(reduce(values, "m k c e -> m k e", "mean")), mask)

    @classmethod
    def num_positions(cls, config: GroupConfig, num_features: int) -> int:
        """One per square."""
        return check_divides(config.factor, num_features)
