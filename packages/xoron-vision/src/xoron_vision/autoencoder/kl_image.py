"""The autoencoder `kl-image`: images to Gaussian latents, an eighth in height and width, and back.

    pixels (M, 3, H, W) from -1 to 1
      -> encoder: levels of residual blocks, each but the last halving H and W, attention below
      -> mean and log-variance (M, C, h, w) of a diagonal Gaussian
      -> (sampled while training) -> decoder, the same levels upwards -> pixels

(Kingma and Welling 2014; Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models".) Weights of diffusers' `AutoencoderKL` fit, and give the same numbers.

Footguns:
- `encode` gives scaled latents and `decode` takes them; the posterior and the training path are
  unscaled. `measure_scale` after training, before a generator sees any latent.
- Pixels go from -1 to 1 inside and in `forward`, whose reconstruction is not clamped and so has a
  gradient everywhere; `decode` gives images from 0 to 1, clamped.
- Some published weights overflow in float16 (those of SDXL); use bfloat16.

Shapes: M images, H and W pixels, C latent channels, h = H / factor and w = W / factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.components import Autoencoder, Context, LossTerm
from xoron_core.errors import DataError
from xoron_core.nn.conv import NORM_EPS, AttentionBlock2d, Downsample2d, ResBlock2d, Upsample2d
from xoron_vision.autoencoder.config import ImageSize, KlImageConfig
from xoron_vision.autoencoder.latent_scale import LatentScale
from xoron_vision.autoencoder.processing import WholeLatents, processor_of
from xoron_vision.autoencoder.source import load_kl_weights

# As published; e^20 and e^-30 are out of any trained posterior's reach.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
PIXEL_ERRORS: dict[str, Callable[..., Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": F.huber_loss,
}


class Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next.

    Args:
        widths: channels before the first block and behind each.
        norm_groups: of the group norms.
        resample: what follows them, or None.
    """

    def __init__(
        self, widths: list[int], *, norm_groups: int, resample: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                ResBlock2d(before, after, norm_groups=norm_groups)
                for before, after in itertools.pairwise(widths)
            )
        )
        self.resample = nn.Identity() if resample is None else resample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(M, widths[0], H, W) to (M, widths[-1], H', W')."""
        return cast(Tensor, self.resample(self.blocks(x)))


class Network(nn.Module):
    """The encoder or the decoder: convolution, levels with the mid block before or behind, head.

    Args:
        config: sizes.
        upwards: whether it is the decoder.
        in_channels: of its input.
        out_channels: of its result.
    """

    def __init__(
        self, config: KlImageConfig, *, upwards: bool, in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        widths = list(reversed(config.channels)) if upwards else list(config.channels)
        lowest, groups = config.channels[-1], config.norm_groups
        self.upwards = upwards
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        middle = [ResBlock2d(lowest, lowest, norm_groups=groups) for _ in range(2)]
        attention = AttentionBlock2d(lowest, norm_groups=groups)
        self.mid = nn.Sequential(middle[0], attention, middle[1])
        if not config.mid_attention:
            self.mid = nn.Sequential(*middle)
        resample = Upsample2d if upwards else Downsample2d
        blocks = config.layers_per_block + int(upwards)
        self.levels = nn.Sequential(
            *(
                Level(
                    [before] + [width] * blocks,
                    norm_groups=groups,
                    resample=None if index == len(widths) - 1 else resample,
                )
                for index, (before, width) in enumerate(
                    zip([widths[0], *widths], widths, strict=False)
                )
            )
        )
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_channels, H, W) to (M, out_channels, H', W')."""
        x = self.conv_in(x)
        x = self.levels(self.mid(x)) if self.upwards else self.mid(self.levels(x))
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))


class KlImage(Autoencoder):
    """Images to Gaussian latents and back."""

    config: KlImageConfig
    entry_methods = ("encode", "decode", "measure_scale")
    # A scale rounded to bfloat16 is another scale.
    keep_fp32 = ("latent_scale",)

    def __init__(self, config: KlImageConfig, context: Context) -> None:
        super().__init__(config, context)
        C = config.latent_channels
        self.encoder = Network(config, upwards=False, in_channels=3, out_channels=2 * C)
        self.decoder = Network(config, upwards=True, in_channels=C, out_channels=3)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.post_quant_conv else nn.Identity()
        self.latent_scale = LatentScale(C, scale=config.latent_scale, shift=config.latent_shift)
        self.apply(initialise)

    @classmethod
    def processor(cls, config: KlImageConfig) -> WholeLatents:
        """Images to pixels from -1 to 1, of whole latents."""
        return processor_of(config)

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels to mean and clamped log-variance, unscaled, each (M, C, h, w).

        Raises:
            DataError: if they are no whole latents.
        """
        check_pixels(pixel_values, self.config, "kl-image")
        mean, log_variance = self.quant_conv(self.encoder(pixel_values)).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def encode(  # type: ignore[override]  # the tensors that its processor collates
        self, pixel_values: Tensor, *, sample: torch.Generator | None = None
    ) -> Tensor:
        """Pixels to scaled latents.

        Args:
            pixel_values: (M, 3, H, W) from -1 to 1.
            sample: draws from the posterior with this generator; None takes its mode.

        Returns:
            (M, C, h, w).
        """
        latents, log_variance = self.posterior(pixel_values)
        if sample is not None:
            noise = torch.randn(
                latents.shape, generator=sample, device=latents.device, dtype=latents.dtype
            )
            latents = latents + torch.exp(0.5 * log_variance) * noise
        return self.latent_scale.apply_to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (M, C, h, w) to images (M, 3, H, W) from 0 to 1.

        `xoron_vision.image.load_image` makes a PIL image of each.
        """
        return to_unit(self.reconstruct(self.latent_scale.undo(latents)))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Unscaled latents (M, C, h, w) to pixels (M, 3, H, W) from about -1 to 1, not clamped."""
        return cast(Tensor, self.decoder(self.post_quant_conv(latents)))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """The training path, with one sample of the posterior; in evaluation with its mode.

        Args:
            pixel_values: (M, 3, H, W) from -1 to 1.

        Returns:
            `reconstruction` (M, 3, H, W), and `mean` and `log_variance` (M, C, h, w), unscaled.
        """
        mean, log_variance = self.posterior(pixel_values)
        latents = mean
        if self.training:
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return {
            "reconstruction": self.reconstruct(latents),
            "mean": mean,
            "log_variance": log_variance,
        }

    def aux_losses(
        self, output: Mapping[str, Tensor], media: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """Pixel error and `kl_weight` times the nats of the posterior, both per colour value.

        Their sum is the published objective divided by the number of colour values, so that a
        published weight keeps its meaning.
        """
        mean, log_variance = output["mean"].float(), output["log_variance"].float()
        error = PIXEL_ERRORS[self.config.pixel_loss]
        pixels, target = output["reconstruction"].float(), media["pixel_values"].float()
        nats = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
        count = self.aux_counts(media)["kl"]
        return {
            "pixel": LossTerm(error(pixels, target, reduction="sum"), count),
            "kl": LossTerm(self.config.kl_weight * nats, count, {"nats": (nats.detach(), count)}),
        }

    def aux_counts(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Colour values, M * 3 * H * W, for both."""
        pixels = media["pixel_values"]
        count = torch.tensor(float(pixels.numel()), device=pixels.device)
        return {"pixel": count, "kl": count}

    def measure_scale(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Sets scale and shift so that latents of these media have mean 0 and deviation 1.

        Args:
            batches: as the processor collates them; some hundred images are enough.

        Raises:
            DataError: if there are none, or a channel of the latents is constant.
        """
        with torch.no_grad():
            self.latent_scale.measure(self.posterior(batch["pixel_values"])[0] for batch in batches)

    def dummy_batch(self) -> dict[str, Tensor]:
        """One grey image of two by two latents."""
        side = 2 * self.config.factor
        return {"pixel_values": torch.zeros(1, 3, side, side)}

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the weights of `path`; without a path they stay random.

        Raises:
            FolderError: if they are missing or do not fit.
        """
        if self.config.path is not None:
            load_kl_weights(self, self.config.path, mid_attention=self.config.mid_attention)


def initialise(module: nn.Module) -> None:
    """Keeps the variance at every convolution, and starts residual branches at zero.

    torch's own start divides the variance by three at each of some twenty convolutions, so that
    colours take thousands of steps to come through.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    elif isinstance(module, ResBlock2d | AttentionBlock2d):
        last = module.conv2 if isinstance(module, ResBlock2d) else module.o_proj
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))


def check_pixels(pixels: Tensor, config: ImageSize, name: str) -> None:
    """Refuses what is no (M, 3, H, W) of whole latents.

    Raises:
        DataError: saying what is expected.
    """
    shape, factor = tuple(pixels.shape), config.factor
    if len(shape) != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor:
        raise DataError(
            f"{name}: pixels of shape {shape}, expected (images, 3, height, width) with multiples"
            f" of {factor}; its processor prepares them"
        )


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels from -1 to 1 to images from 0 to 1, clamped."""
    return ((pixels + 1) / 2).clamp(0, 1)
