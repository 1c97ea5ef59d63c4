"""The loss `perceptual`: how far a reconstruction is from its image in the eyes of a SigLIP tower.

At several layers, features of both are scaled to length 1 at every patch; the loss is the mean over
patches of their squared distance (as LPIPS without its learned weights: Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

Footguns:
- The tower gets no gradient here, whether it is frozen or not; the pixels do.
- A tower of a path is read when it is first needed and is no part of the model: it is neither saved
  nor counted, and a folder opens without it.
- A tower of a slot is called from outside its own forward: shard neither under FSDP, name a path.

Shapes: M images, H and W pixels, L patches, E width of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.func import functional_call

from xoron_core.components import Context, Loss, LossTerm
from xoron_core.errors import CompositionError, ConfigError
from xoron_vision.autoencoder.config import PerceptualConfig
from xoron_vision.autoencoder.judged import check_judged, original_of, pair_of
from xoron_vision.config import SiglipConfig
from xoron_vision.siglip import SiglipEncoder

NUM_LAYERS = 4


class Perceptual(Loss):
    """Distance between SigLIP features, per image."""

    config: PerceptualConfig

    def __init__(self, config: PerceptualConfig, context: Context) -> None:
        super().__init__(config, context)
        check_judged(config.of, context)
        # In a list: referred to, not owned, so not saved with this slot.
        self._judge: list[SiglipEncoder] = []
        if config.encoder is not None:
            self._judge.append(_encoder(config.encoder, context))
            _layers(config, self._judge[0])

    def forward(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> LossTerm:
        """Sums over images; without media, zero."""
        count = self.count(batch)
        pair = pair_of(self.config.of, outputs, batch)
        if pair is None:
            return LossTerm(torch.zeros_like(count), count)
        seen = self.features(pair.reconstruction)
        with torch.no_grad():
            wanted = self.features(pair.original)
        distances = [(a - b).square().sum(-1).mean(-1) for a, b in zip(seen, wanted, strict=True)]
        distance = torch.stack(distances).mean(0).sum()
        metrics = {"distance": (distance.detach(), count)}
        return LossTerm(self.config.weight * distance, count, metrics)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """M."""
        original = original_of(self.config.of, batch)
        if original is None:
            return torch.zeros(())
        return torch.tensor(float(len(original)), device=original.device)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """(M, 3, H, W) from -1 to 1 to features (M, L, E) of length 1, fp32, of each layer."""
        judge = self.judge().to(pixels.device)
        output = functional_call(
            judge.tower,
            {name: parameter.detach() for name, parameter in judge.tower.named_parameters()},
            kwargs={
                "pixel_values": tower_pixels(pixels, judge),
                "interpolate_pos_encoding": judge.config.size != judge.config.own_size,
                "output_hidden_states": True,
            },
        )
        layers = _layers(self.config, judge)
        return [F.normalize(output.hidden_states[layer].float(), dim=-1) for layer in layers]

    def judge(self) -> SiglipEncoder:
        """The tower that looks at images, read from `path` at the first call.

        Raises:
            ConfigError, FolderError: if there is none.
        """
        if not self._judge:
            assert self.config.path is not None
            config = SiglipConfig.parse({"path": self.config.path}).resolved()
            tower = SiglipEncoder(config, Context(self.slot))
            tower.load_source_weights(torch.Generator())
            _check_fixed(tower, self.config.path)
            _layers(self.config, tower)
            self._judge.append(tower.requires_grad_(False).eval())
        return self._judge[0]

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Reads the tower of `path`, so that a wrong one is an error when the model is composed."""
        self.judge()


def tower_pixels(pixels: Tensor, judge: SiglipEncoder) -> Tensor:
    """(M, 3, H, W) from -1 to 1 to the tower's own size and normalisation, differentiably."""
    how = judge.config.preprocess
    assert how is not None
    if pixels.shape[-2:] != judge.config.size:
        pixels = F.interpolate(
            pixels.float(), size=judge.config.size, mode="bicubic", antialias=True
        )
    mean, std = (
        rearrange(torch.tensor(each, device=pixels.device), "C -> C 1 1")
        for each in (how.mean, how.std)
    )
    eight_bits = (pixels.float() + 1) * 127.5
    dtype = next(judge.parameters()).dtype
    return ((eight_bits * how.scale - mean) / std).to(dtype)


def _encoder(slot: str, context: Context) -> SiglipEncoder:
    part = context.parts.get(slot, None)
    if not isinstance(part, SiglipEncoder):
        held = "nothing" if part is None else type(part).__name__
        raise CompositionError(
            f"slot {context.slot!r}: `encoder` names {slot!r}, which holds {held}; expected a"
            " siglip encoder, or set `path` instead"
        )
    _check_fixed(part, slot)
    return part


def _check_fixed(judge: SiglipEncoder, where: str) -> None:
    if judge.config.native:
        raise ConfigError(
            f"perceptual: the tower of {where!r} is NaFlex; expected one of a fixed size, such as"
            " siglip2-base-patch16-256"
        )


def _layers(config: PerceptualConfig, judge: SiglipEncoder) -> tuple[int, ...]:
    depth = int(judge.tower.config.num_hidden_layers)
    if config.layers is None:
        number = min(NUM_LAYERS, depth)
        return tuple(depth * (index + 1) // number for index in range(number))
    if wrong := [layer for layer in config.layers if not 0 <= layer <= depth]:
        raise ConfigError(f"perceptual: layers {wrong}, but the tower has 0 to {depth}")
    return config.layers
