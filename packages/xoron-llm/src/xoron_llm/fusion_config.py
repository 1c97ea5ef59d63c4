"""The config of the cross-attention fusion; imports nothing heavy."""

from __future__ import annotations

from pydantic import Field, field_validator

from xoron_core.config import Config


class CrossAttentionConfig(Config):
    """Cross-attention adapters between the layers of a backbone.

    Attributes:
        layers: indices, from 0, of the backbone layers after which one stands; None spaces
            `num_layers` of them evenly, the last behind the last layer: of 12 layers after 2, 5, 8
            and 11.
        num_layers: how many; a backbone of fewer layers has one after each.
        num_heads: heads of each.
        head_dim: width of a head; None is the backbone's width divided by `num_heads`.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial query, key and value projections; the
            output projection starts at zero.
    """

    layers: tuple[int, ...] | None = None
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"layers {list(layers)}: expected one index or more, ascending, each once; leave it"
                " out for evenly spaced ones"
            )
        return layers
