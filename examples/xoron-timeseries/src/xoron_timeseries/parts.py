"""Encoder, projector, codec and loss of numeric series.

Shapes: M items, T values, L patches of P values, E feature width, D backbone width.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from xoron_core import components as c
from xoron_core.tokens.space import CodecRange

from xoron_timeseries.series import SeriesProcessor


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """(M, T) values to exponents (M, 1) and mantissas (M, T) in [-1, 1] times 2 ** exponent."""
    exponents = torch.frexp(values.float().abs().amax(-1, keepdim=True)).exponent.clamp(min=-100)
    return exponents, torch.ldexp(values.float(), -exponents)


class Series(c.Part):
    """What reads series."""

    config: Any

    def dummy_batch(self) -> c.MediaTensors:
        values = torch.ones(1, getattr(self.config, "patch_size", 1))
        return {"values": values, "valid": values > 0}


class SeriesEncoder(Series, c.Encoder):
    """Each patch of standardised values, with mean, spread and exponent beside it, to a feature."""

    def __init__(self, config: Any, context: c.Context) -> None:
        super().__init__(config, context)
        self.feature_size = width = config.feature_size
        first = nn.Linear(config.patch_size + 3, width)
        self.layers = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))

    @classmethod
    def processor(cls, config: Any) -> SeriesProcessor:
        return SeriesProcessor(config.patch_size)

    def forward(self, **media: Tensor) -> c.Features:
        """`values` and `valid` (M, L * P) to features (M, L, E)."""
        exponents, mantissas = split(media["values"])
        count = media["valid"].sum(-1, keepdim=True)
        mean = mantissas.sum(-1, keepdim=True) / count
        centred = (mantissas - mean) * media["valid"]
        spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
        pattern, size = "m (l p) -> m l p", self.config.patch_size
        patches = rearrange(centred / (spread + 1e-6), pattern, p=size)
        level = torch.cat([mean, spread, exponents / 8], dim=-1)[:, None]
        inputs = torch.cat([patches, level.expand(-1, patches.shape[1], -1)], dim=-1)
        mask = rearrange(media["valid"], pattern, p=size).any(-1)
        return c.Features(self.layers(inputs.to(next(self.parameters()).dtype)), mask)


class SeriesProjector(c.Projector):
    """One linear layer from E to D; without a backbone, to E."""

    def __init__(self, config: Any, context: c.Context) -> None:
        super().__init__(config, context)
        assert context.feature_size, "the composer demands an encoder"
        self.layer = nn.Linear(context.feature_size, context.hidden_size or context.feature_size)

    @classmethod
    def num_positions(cls, config: Any, num_features: int) -> int:
        return num_features

    def forward(self, features: c.Features) -> c.Features:
        """(M, L, E) to (M, L, D)."""
        return features._replace(values=self.layer(features.values))


class SeriesCodec(Series, c.Codec):
    """One id for the exponent, then for each mantissa the nearest of `bins` learned levels.

    Trained alone on squared error, levels move to where values are (Lloyd 1982).
    """

    def __init__(self, config: Any, context: c.Context) -> None:
        super().__init__(config, context)
        self.levels = nn.Parameter(torch.linspace(-1, 1, config.bins))

    @classmethod
    def processor(cls, config: Any) -> SeriesProcessor:
        return SeriesProcessor(extra=1)

    @classmethod
    def ranges(cls, config: Any) -> list[CodecRange]:
        name, identity = "xoron-timeseries/series", "block-floating-point"
        return [CodecRange(name, 0, config.bins, identity, None, "series")]

    @classmethod
    def frame_limits(cls, config: Any) -> tuple[int, int]:
        return 2, config.max_length + 1

    @torch.no_grad()
    def encode(self, **media: Tensor) -> c.Codes:
        """`values` and `valid` (M, T) to ids (M, T + 1, 1)."""
        exponents, mantissas = split(media["values"])
        first = (exponents + len(self.levels) // 2).clamp(0, len(self.levels) - 1)
        ids = torch.cat([first, self._nearest(mantissas)], dim=1)
        valid = torch.cat([media["valid"][:, :1], media["valid"]], dim=1)
        return c.Codes(ids[..., None], valid, [{} for _ in ids])

    def decode(self, ids: Tensor, metadata: Any) -> Tensor:
        """(M, T + 1, 1) ids to (M, T) values."""
        exponents = ids[:, :1, 0] - len(self.levels) // 2
        return torch.ldexp(self.levels[ids[:, 1:, 0]].float(), exponents)

    def forward(self, **media: Tensor) -> dict[str, Tensor]:
        """`reconstruction` (M, T) of the mantissas, and its `target`."""
        _, mantissas = split(media["values"])
        return {"reconstruction": self.levels[self._nearest(mantissas)], "target": mantissas}

    def _nearest(self, mantissas: Tensor) -> Tensor:
        return (mantissas[..., None] - self.levels.detach()).abs().argmin(-1)


class SeriesLoss(c.Loss):
    """Squared error of reconstructed mantissas, padding left out."""

    config: Any

    def forward(self, outputs: Any, batch: Any) -> c.LossTerm:
        if (found := outputs.get(self.config.of)) is None:
            return c.LossTerm(torch.zeros(()), torch.zeros(()))
        errors = (found["reconstruction"] - found["target"]).float().square()
        return c.LossTerm(errors[batch["media"][self.config.of]["valid"]].sum(), self.count(batch))

    def count(self, batch: Any) -> Tensor:
        media = (batch.get("media") or {}).get(self.config.of)
        return torch.zeros(()) if media is None else media["valid"].sum().float()
