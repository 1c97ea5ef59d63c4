"""The loss `patch-gan`: a discriminator of patches against reconstructions, in one backward pass.

A convolutional network says of every patch whether it is of a photograph or of a decoder (Isola et
al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks"); hinge loss as in
Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis".

    discriminator:  mean of relu(1 - D(image)) and relu(1 + D(reconstruction, detached))
    generator:      -D(reconstruction), D's parameters detached

Each term has a gradient for one side alone, so that one sum and one backward pass give both sides
exactly what two separate passes would, and accumulation and sharding work as for any other loss.

Footguns:
- Group norm stands where the papers have batch norm, whose running statistics `forward` may not
  change and whose result depends on the rest of the batch.
- The weight is fixed; the adaptive one of Esser et al. needs gradients of its own.
- The discriminator is of training only: a model folder has no weights of it.
- Start it on an autoencoder that already reconstructs, as a second stage.

Shapes: M images, H and W pixels, h and w patches down and across.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from xoron_core.components import Context, Loss, LossTerm
from xoron_core.errors import DataError
from xoron_vision.autoencoder.config import PatchGanConfig
from xoron_vision.autoencoder.judged import check_judged, original_of, pair_of

SLOPE = 0.2
INIT_STD = 0.02


class Discriminator(nn.Module):
    """4 by 4 convolutions: `num_layers` of stride 2, two of stride 1.

    Args:
        config: sizes.
    """

    def __init__(self, config: PatchGanConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**n, 8) for n in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]
        for index, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if index < config.num_layers else 1
            layers += [
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(config.norm_groups, width),
            ]
        layers += [nn.LeakyReLU(SLOPE), nn.Conv2d(widths[-1], 1, 4, padding=1)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=INIT_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) to (M, 1, h, w), positive where a patch looks like a photograph."""
        return cast(Tensor, self.layers(pixels))


class PatchGan(Loss):
    """Hinge losses of a discriminator and of what it judges, per patch."""

    config: PatchGanConfig

    def __init__(self, config: PatchGanConfig, context: Context) -> None:
        super().__init__(config, context)
        check_judged(config.of, context)
        self.discriminator = Discriminator(config)

    def forward(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> LossTerm:
        """Sums over patches; without media, zero with a zero gradient for every parameter.

        Raises:
            DataError: if the images are smaller than a patch.
        """
        count = self.count(batch)
        judge = self.discriminator
        pair = pair_of(self.config.of, outputs, batch)
        if pair is None:
            nothing = torch.stack([parameter.sum() for parameter in judge.parameters()]).sum()
            return LossTerm(0.0 * nothing, count)
        dtype = next(judge.parameters()).dtype
        fake, real = (each.to(dtype) for each in pair)
        detached = {name: parameter.detach() for name, parameter in judge.named_parameters()}
        generator = -functional_call(judge, detached, (fake,)).float().sum()
        right, wrong = judge(real).float(), judge(fake.detach()).float()
        discriminator = 0.5 * (F.relu(1 - right) + F.relu(1 + wrong)).sum()
        metrics = {
            "generator": (generator.detach(), count),
            "discriminator": (discriminator.detach(), count),
        }
        return LossTerm(discriminator + self.config.weight * generator, count, metrics)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Patches, M * h * w.

        Raises:
            DataError: if the images are smaller than a patch.
        """
        original = original_of(self.config.of, batch)
        if original is None:
            return torch.zeros((), device=next(self.discriminator.parameters()).device)
        step = 2**self.config.num_layers
        h, w = (side // step - 2 for side in original.shape[-2:])
        if h < 1 or w < 1:
            raise DataError(
                f"patch-gan: images of {tuple(original.shape[-2:])} pixels, expected at least"
                f" {3 * step} in height and width for num_layers {self.config.num_layers}; lower"
                " num_layers, or train on larger images"
            )
        return torch.tensor(float(len(original) * h * w), device=original.device)
