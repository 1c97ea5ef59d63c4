"""The autoencoder `diffusers-image`: an image autoencoder of diffusers, used as it is.

AutoencoderKL, AutoencoderTiny and AutoencoderDC, from a folder. It is frozen and has no training
path: `kl-image` trains, and reads folders of AutoencoderKL too.

Footgun: diffusers is an extra, `pip install 'xoron-vision[diffusers]'`; a model folder with this
component needs it as well.

Shapes: M images, H and W pixels, C latent channels, h = H / factor and w = W / factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from xoron_core.components import Autoencoder, Context
from xoron_core.errors import ConfigError, FolderError, PluginError
from xoron_vision.autoencoder.config import DiffusersImageConfig, latent_scale_of
from xoron_vision.autoencoder.kl_image import check_pixels, to_unit
from xoron_vision.autoencoder.latent_scale import LatentScale
from xoron_vision.autoencoder.processing import WholeLatents, processor_of


class DiffusersImage(Autoencoder):
    """Images to latents and back, by an autoencoder of diffusers.

    Raises:
        PluginError: if diffusers is not installed, with the line that installs it.
    """

    config: DiffusersImageConfig
    entry_methods = ("encode", "decode", "measure_scale")
    keep_fp32 = ("latent_scale",)

    def __init__(self, config: DiffusersImageConfig, context: Context) -> None:
        super().__init__(config, context)
        network = build_network(config).requires_grad_(False)
        self.network: Any = network
        found = dict(network.config)
        scale = latent_scale_of(found)
        self.latent_scale = LatentScale(
            int(found["latent_channels"]), scale=scale["latent_scale"], shift=scale["latent_shift"]
        )

    @classmethod
    def processor(cls, config: DiffusersImageConfig) -> WholeLatents:
        """Images to pixels from -1 to 1, of whole latents."""
        return processor_of(config)

    def encode(  # type: ignore[override]  # the tensors that its processor collates
        self, pixel_values: Tensor, *, sample: torch.Generator | None = None
    ) -> Tensor:
        """Pixels (M, 3, H, W) from -1 to 1 to scaled latents (M, C, h, w).

        Args:
            pixel_values: (M, 3, H, W) from -1 to 1.
            sample: draws with this generator where the autoencoder has a posterior.
        """
        return self.latent_scale.apply_to(self._latents(pixel_values, sample))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (M, C, h, w) to images (M, 3, H, W) from 0 to 1."""
        pixels = self.network.decode(self.latent_scale.undo(latents), return_dict=False)[0]
        return to_unit(cast(Tensor, pixels))

    def measure_scale(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Sets scale and shift so that latents of these media have mean 0 and deviation 1.

        Args:
            batches: as the processor collates them.

        Raises:
            DataError: if there are none, or a channel of the latents is constant.
        """
        with torch.no_grad():
            self.latent_scale.measure(self._latents(b["pixel_values"], None) for b in batches)

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
            load_network(self.network, self.config.path)

    def _latents(self, pixel_values: Tensor, sample: torch.Generator | None) -> Tensor:
        check_pixels(pixel_values, self.config, "diffusers-image")
        if not len(pixel_values):  # their attention cannot reshape what is empty
            h, w = (side // self.config.factor for side in pixel_values.shape[-2:])
            return pixel_values.new_zeros(0, int(self.network.config.latent_channels), h, w)
        found = self.network.encode(pixel_values, return_dict=False)[0]
        if isinstance(found, Tensor):
            return found
        return cast(Tensor, found.mode() if sample is None else found.sample(sample))


def build_network(config: DiffusersImageConfig) -> Any:
    """An autoencoder of diffusers with random weights, or none on the meta device.

    Raises:
        PluginError: if diffusers is not installed.
        ConfigError: if it does not take the config.
    """
    try:
        import diffusers
    except (ImportError, OSError) as error:
        raise PluginError(
            f"autoencoder/diffusers-image needs diffusers, which cannot be imported ({error}); run:"
            " pip install 'xoron-vision[diffusers]'"
        ) from None
    if config.network is None:
        raise ConfigError("diffusers-image: the config is not resolved; use config.resolved()")
    data = {key: value for key, value in config.network.items() if not key.startswith("_")}
    try:
        return getattr(diffusers, config.network["_class_name"]).from_config(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"diffusers-image: network makes no autoencoder: {error}") from None


def load_network(network: Any, path: str) -> None:
    """Copies a folder's weights into an autoencoder of diffusers.

    Raises:
        FolderError: if they cannot be read, or some are missing or of another shape.
    """
    try:
        source, info = type(network).from_pretrained(
            path, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FolderError(
            f"diffusers-image: the weights of {path!r} cannot be loaded ({reason}); give the folder"
            " of an autoencoder, with config.json and safetensors files"
        ) from None
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise FolderError(
            f"diffusers-image: {path!r} lacks {len(wrong)} weights of {type(network).__name__}, or"
            f" has them in another shape, e.g. {wrong[0]}; copy the folder again, whole"
        )
    network.load_state_dict(source.state_dict())
