"""The codec `rvq-audio`: a recording as frames of Q ids, each codebook on what is left over.

    samples (M, 1, L) of equal loudness -> causal convolutions, a frame every `hop` samples
      -> (M, T, D) -> residual quantiser -> T * Q ids
      -> causal convolutions upwards -> samples

(Zeghidour et al. 2021, "SoundStream"; Defossez et al. 2022, "High Fidelity Neural Audio
Compression"), trained on the difference of samples and of log-mel spectra; a discriminator is none
of its own.

Loudness: every recording is scaled to one root mean square before it is encoded, so codes are not
spent on volume, and the metadata hold the `scale` that takes it back. What is generated has no
metadata and scale 1: it comes out at the loudness of the config, and needs none.

Footguns:
- The codebooks learn from `statistics`, by `after_optimizer_step`; without it a new codec learns
  to live with random codes.
- The scale of a recording is known at its end. A codec that is to encode streams needs
  `loudness: null`.
- `samples`, and the reconstruction of `forward`, are of equal loudness; `decode` gives back each
  recording's own.

Shapes: M items, L samples, T frames, Q codebooks, D numbers of a code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from xoron_audio.codec import network
from xoron_audio.codec.base import NUM_SAMPLES, AudioCodec
from xoron_audio.codec.config import RvqAudioConfig
from xoron_audio.codec.processing import Waveforms
from xoron_audio.codec.spectrum import log_mel_count, log_mel_error
from xoron_core.components import Codes, Context, LossTerm
from xoron_core.errors import DataError
from xoron_core.nn.quantize import Quantized, ResidualQuantizer, usage_entropy

SCALE = "scale"
# Of recordings that are left as they are.
USUAL_LOUDNESS = 0.1


class RvqAudio(AudioCodec):
    """Recordings to frames of ids and back."""

    config: RvqAudioConfig
    name = "rvq-audio"
    keep_fp32 = ("quantizer",)

    def __init__(self, config: RvqAudioConfig, context: Context) -> None:
        super().__init__(config, context)
        self.encoder = network.encoder(config)
        self.quantizer = ResidualQuantizer(
            config.num_codebooks,
            config.codebook_size,
            dim=config.code_dim,
            dropout=config.dropout,
            decay=config.decay,
            commitment=config.commitment,
            restart_below=config.restart_below,
        )
        self.decoder = network.decoder(config)
        self.apply(network.initialise)
        # What the networks see and make is of root mean square 1.
        self.level = config.loudness or USUAL_LOUDNESS

    @classmethod
    def processor(cls, config: RvqAudioConfig) -> Waveforms:
        """Mono, at the codec's rate and loudness, in whole frames."""
        return Waveforms(config, loudness=config.loudness)

    @torch.no_grad()
    def encode(  # type: ignore[override]  # the tensors that its processor collates
        self, samples: Tensor, *, num_samples: Tensor, scale: Tensor
    ) -> Codes:
        """Samples to ids, with all codebooks.

        Args:
            samples: (M, 1, L) as the processor makes them.
            num_samples: (M,) int64, of each item without its padding.
            scale: (M,), what they were divided by.

        Returns:
            Ids (M, T, Q); metadata hold `num_samples` and `scale`.

        Raises:
            DataError: for samples of another shape.
        """
        frames = self._frames(samples)
        every = torch.full(frames.shape[:1], self.config.num_codebooks, device=frames.device)
        ids = self.quantizer(frames, depths=every).indices
        pairs = zip(num_samples.tolist(), scale.tolist(), strict=True)
        metadata = [{NUM_SAMPLES: count, SCALE: factor} for count, factor in pairs]
        return Codes(ids, self.frame_mask(samples, num_samples), metadata)

    def to_samples(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(M, T, Q) to (M, 1, T * hop).

        Raises:
            DataError: for a scale that is no number above 0.
        """
        samples = self._reconstruct(self.quantizer.lookup(ids))
        scales = torch.tensor([_scale(entry) for entry in metadata], device=samples.device)
        return samples.float() * rearrange(scales, "M -> M 1 1")

    def forward(  # type: ignore[override]
        self, samples: Tensor, *, num_samples: Tensor, scale: Tensor | None = None
    ) -> dict[str, Any]:
        """The training path; the gradient passes straight through the quantiser.

        Args:
            samples: (M, 1, L) as the processor makes them.
            num_samples: (M,) int64.
            scale: not read.

        Returns:
            `reconstruction` (M, 1, L), zero behind each item's end, `ids` (M, T, Q), -1 where a
            codebook was left out, and `commitment` (M, T), zero behind the end; while it learns,
            `statistics` for `after_optimizer_step`.
        """
        mask = self.frame_mask(samples, num_samples)
        found: Quantized = self.quantizer(self._frames(samples), mask=mask)
        reconstruction = self._reconstruct(found.values)
        inside = torch.arange(samples.shape[-1], device=samples.device) < num_samples[:, None]
        output: dict[str, Any] = {
            "reconstruction": reconstruction * inside[:, None],
            "ids": found.indices,
            "commitment": found.commitment * mask,
        }
        learns = self.training and any(p.requires_grad for p in self.parameters())
        return output | ({"statistics": dict(found.statistics)} if learns else {})

    def aux_losses(
        self, output: Mapping[str, Tensor], media: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """Difference of samples, in units of the loudness, per sample; of log-mel spectra, per
        number of these; and the commitment, per frame."""
        config, counts = self.config, self.aux_counts(media)
        target, samples = media["samples"].float(), output["reconstruction"].float()
        waveform = (samples - target).abs().sum() / self.level
        spectrum = log_mel_error(
            samples[:, 0], target[:, 0], rate=config.rate, windows=config.mel_windows
        )
        sums = {
            "waveform": config.waveform_weight * waveform,
            "spectrum": config.spectrum_weight * spectrum,
            "commitment": output["commitment"].sum(),
        }
        return {name: LossTerm(total, counts[name]) for name, total in sums.items()}

    def aux_counts(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Samples, numbers of spectra, and frames."""
        config, lengths = self.config, media["num_samples"]
        return {
            "waveform": lengths.sum().float(),
            "spectrum": log_mel_count(lengths, rate=config.rate, windows=config.mel_windows),
            "commitment": self.frame_mask(media["samples"], lengths).sum().float(),
        }

    def after_optimizer_step(self, stats: Mapping[str, Tensor]) -> None:
        """Moves the codebooks by the statistics of a step."""
        self.quantizer.update(stats)

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """How evenly the codes of each codebook were used in a step, from 0 to 1; small batches
        cannot reach 1."""
        found = {q: stats[f"{q}.counts"] for q in range(self.config.num_codebooks)}
        return {
            f"code_entropy_{q}": float(usage_entropy(counts))
            for q, counts in found.items()
            if counts.any()
        }

    def dummy_batch(self) -> dict[str, Tensor]:
        """One frame of silence."""
        hop = self.config.hop
        return {
            "samples": torch.zeros(1, 1, hop),
            "num_samples": torch.tensor([hop]),
            "scale": torch.ones(1),
        }

    def _frames(self, samples: Tensor) -> Tensor:
        frames = self.encoder(self.checked(samples) / self.level)
        return cast(Tensor, rearrange(frames, "M D T -> M T D").float())

    def _reconstruct(self, codes: Tensor) -> Tensor:
        weights = next(self.decoder.parameters())
        frames = rearrange(codes.to(weights.dtype), "M T D -> M D T")
        return cast(Tensor, self.decoder(frames) * self.level)


def _scale(metadata: Mapping[str, Any]) -> float:
    scale = metadata.get(SCALE, 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise DataError(f"rvq-audio: scale is {scale!r}, expected a number above 0")
    return float(scale)
