"""The codec `hf-audio`: audio codecs of transformers as they are, for use and not for training.

    EncodecModel  encodec  24 kHz mono, or 48 kHz stereo in chunks  Defossez et al. 2022
    DacModel      dac      16, 24 or 44.1 kHz                       Kumar et al. 2023
    MimiModel     mimi     24 kHz, 12.5 frames a second             Defossez et al. 2024, "Moshi"

From a folder of transformers' form. Ids are transformers' own for each recording alone: recordings
of one length run together, others apart, because these networks look at padding (EnCodec and Mimi
where a recording begins or ends, DAC everywhere).

EnCodec's 48 kHz checkpoint cuts a recording into chunks of a second, a hundredth overlapping, and
scales each to one loudness. Every chunk takes as many frames, the last one filled up with silence,
so 10 s are 11 chunks of 150 frames; the metadata hold the 11 `scales`. Without them nothing can be
decoded, so it reads recordings and makes none (`needs_metadata`).

Footguns:
- The number of codebooks is the checkpoint's most unless `num_codebooks` says fewer; published
  uses have 2 to 8 of EnCodec's and Mimi's 32.
- It always runs in evaluation mode: DAC would draw a number of codebooks in training.

Shapes: M items, C channels, L samples, T frames, Q codebooks, n chunks of S samples and f frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor, nn

from xoron_audio.codec.base import NUM_SAMPLES, AudioCodec
from xoron_audio.codec.hf_config import CODEC_CLASSES, HfAudioConfig
from xoron_audio.codec.processing import Waveforms
from xoron_core.components import Codes, Context
from xoron_core.errors import ConfigError, DataError, FolderError

SCALES = "scales"
# A minute of chunks in one pass would fill gigabytes.
CHUNKS_AT_ONCE = 16
# Of config.json, what the config's class does not take.
_NOT_ARGUMENTS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")


class HfAudio(AudioCodec):
    """Recordings to ids and back, by an audio codec of transformers.

    Raises:
        ConfigError: if transformers does not take its config.
    """

    config: HfAudioConfig
    name = "hf-audio"

    def __init__(self, config: HfAudioConfig, context: Context) -> None:
        super().__init__(config, context)
        self.network: Any = build_network(config).requires_grad_(False)
        self.eval()

    @classmethod
    def processor(cls, config: HfAudioConfig) -> Waveforms:
        """At the codec's rate, with its channels."""
        return Waveforms(config, whole_frames=False)

    @classmethod
    def needs_metadata(cls, config: HfAudioConfig) -> bool:
        """Whether it cuts recordings into chunks, or scales them."""
        return config.chunk is not None or config.normalized

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(  # type: ignore[override]  # the tensors that its processor collates
        self, samples: Tensor, *, num_samples: Tensor, scale: Tensor | None = None
    ) -> Codes:
        """Samples to ids.

        Args:
            samples: (M, C, L) as the processor makes them.
            num_samples: (M,) int64, of each item without its padding.
            scale: not read.

        Returns:
            Ids (M, T, Q), zero behind an item's end; metadata hold `num_samples`, and `scales`
            where chunks have them.

        Raises:
            DataError: for samples of another shape.
        """
        x, config = self.checked(samples), self.config
        Q, _ = config.codebooks
        mask = self.frame_mask(x, num_samples)
        ids = torch.zeros(*mask.shape, Q, dtype=torch.int64, device=x.device)
        lengths = num_samples.tolist()
        metadata: list[dict[str, Any]] = [{NUM_SAMPLES: length} for length in lengths]
        for length, rows in _alike(lengths).items():
            found, scales = self._encode(x[rows, :, :length])
            ids[rows, : found.shape[1]] = found
            if scales is not None:
                for row, own in zip(rows, scales.tolist(), strict=True):
                    metadata[row][SCALES] = own
        return Codes(ids, mask, metadata)

    def to_samples(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(M, T, Q) to (M, C, L), zero behind an item's end.

        Raises:
            DataError: if chunks have no scales, or others.
        """
        config = self.config
        lengths = [self._length(entry, ids.shape[1]) for entry in metadata]
        weights = next(self.parameters())
        out = weights.new_zeros(len(ids), config.channels, max(lengths))
        for length, rows in _alike(lengths).items():
            codes = ids[rows, : config.frames(length)]
            scales = self._scales([metadata[row] for row in rows], codes.shape[1])
            found = self._decode(codes, scales)[..., :length]
            # DAC's odd strides lose some of the last samples.
            out[rows, :, :length] = F.pad(found, (0, length - found.shape[-1]))
        return out

    def dummy_batch(self) -> dict[str, Tensor]:
        """One frame of silence."""
        samples = torch.zeros(1, self.config.channels, self.config.hop)
        return {"samples": samples, "num_samples": torch.tensor([self.config.hop])}

    def reset_buffers(self) -> None:
        """Takes what is computed and not saved from a codec that has just been built."""
        saved = set(self.network.state_dict())
        if all(name in saved for name, _ in self.network.named_buffers()):
            return
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            fresh = dict(build_network(self.config).named_buffers())
        for name, buffer in self.network.named_buffers():
            if name not in saved:
                buffer.copy_(fresh[name])

    @classmethod
    def find_source(cls, config: HfAudioConfig) -> None:
        """Looks for the weights of `path`.

        Raises:
            FolderError: if there are none.
        """
        if config.path is not None and not any(Path(config.path).glob("*.safetensors")):
            raise FolderError(
                f"hf-audio: {config.path}: no *.safetensors files; give the folder of an audio"
                " codec, with config.json and weights"
            )

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the weights of `path`; without a path they stay random.

        Raises:
            FolderError: if some are missing or of another shape.
        """
        if self.config.path is not None:
            load_network(self.network, self.config.path)

    def _length(self, metadata: Mapping[str, Any], frames: int) -> int:
        if self.config.chunk is None:
            return super()._length(metadata, frames)
        length = metadata.get(NUM_SAMPLES)
        if not isinstance(length, int) or length < 1 or self.config.frames(length) > frames:
            raise DataError(
                f"hf-audio: {NUM_SAMPLES} is {length!r} for {frames} frames; this codec's chunks"
                " are decoded with the metadata that encoding gave"
            )
        return length

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(m, C, N) of one length to ids (m, T, Q) and the scales (m, n) of their chunks."""
        if not len(x):
            T, (Q, _) = self.config.frames(x.shape[-1]), self.config.codebooks
            return torch.zeros(0, T, Q, dtype=torch.int64, device=x.device), None
        if self.config.model_type == "encodec":
            return self._encode_chunks(x)
        Q, _ = self.config.codebooks
        if self.config.model_type == "dac":
            x = F.pad(x, (0, -x.shape[-1] % self.config.hop))  # as its feature extractor does
            codes = self.network.encode(x, n_quantizers=Q).audio_codes
        else:
            codes = self.network.encode(x, num_quantizers=Q).audio_codes
        return rearrange(codes, "m Q T -> m T Q"), None

    def _encode_chunks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """EnCodec; without chunks all is one."""
        m, N = len(x), x.shape[-1]
        S, stride = self.config.chunk or (N, N)
        n = -(-N // stride)
        x = F.pad(x, (0, (n - 1) * stride + S - N))
        chunks = rearrange(x.unfold(-1, S, stride), "m C n S -> (m n) C S")
        bandwidth = self.config.bandwidths[self.config.codebooks[0]]
        found = [
            self.network.encode(some, bandwidth=bandwidth, return_dict=False)[:2]
            for some in chunks.split(CHUNKS_AT_ONCE)
        ]
        # transformers sees a second chunk in the end of each, which its successor begins with.
        ids = torch.cat([codes[0] for codes, _ in found])
        loud = [scales[0] for _, scales in found if scales[0] is not None]
        scales = torch.cat(loud).view(m, n) if loud else None
        return rearrange(ids, "(m n) Q f -> m (n f) Q", m=m), scales

    def _decode(self, ids: Tensor, scales: Tensor | None) -> Tensor:
        """Ids (m, T, Q) and the scales (m, n) of their chunks to samples (m, C, L)."""
        codes = rearrange(ids, "m T Q -> m Q T")
        if self.config.model_type == "dac":
            return cast(Tensor, self.network.decode(audio_codes=codes).audio_values)[:, None]
        if self.config.model_type == "mimi":
            return cast(Tensor, self.network.decode(codes).audio_values)
        n = ids.shape[1] // (self.config.chunk_frames or ids.shape[1])
        chunks = rearrange(codes, "m Q (n f) -> n m Q f", n=n)
        loud = [None] * n if scales is None else scales.T
        return cast(Tensor, self.network.decode(chunks, loud).audio_values)

    def _scales(self, metadata: Sequence[Mapping[str, Any]], frames: int) -> Tensor | None:
        """The scales (m, n) of some items' chunks, each of so many frames in all."""
        if not self.config.normalized:
            return None
        n = frames // (self.config.chunk_frames or frames)
        rows = [entry.get(SCALES) for entry in metadata]
        for row in rows:
            if not isinstance(row, list) or len(row) != n:
                raise DataError(
                    f"hf-audio: {SCALES} is {row!r}, expected the {n} numbers that encoding gave"
                    f" for {n} chunks; ids alone do not say how loud they are"
                )
        return torch.tensor(rows, device=next(self.parameters()).device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; Mimi keeps its codebooks a second time, where no cast finds them."""
        moved = super()._apply(fn, recurse)
        forget_codebooks(self.network)
        return moved


def build_network(config: HfAudioConfig) -> Any:
    """An audio codec of transformers with random weights, or none on the meta device.

    Raises:
        ConfigError: if it does not take the config.
    """
    config.get("sampling_rate")
    name = CODEC_CLASSES[config.model_type]
    make = getattr(transformers, name.replace("Model", "Config"))
    data = {k: v for k, v in (config.network or {}).items() if k not in _NOT_ARGUMENTS}
    try:
        network = getattr(transformers, name)(make(**data))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"hf-audio: network makes no {name}: {error}") from None
    for path, buffer in network.named_buffers():
        # transformers starts codebooks at zero, and all ids would be 0.
        if path.rpartition(".")[2] in ("embed", "embed_sum"):
            nn.init.normal_(buffer)
    # It also makes tensors that are not of the default device.
    return network.eval().to(torch.get_default_device())


def forget_codebooks(network: Any) -> None:
    """Drops the codebooks that Mimi computed from its buffers; it computes them again."""
    for module in network.modules():
        if getattr(module, "_embed", None) is not None:
            module._embed = None


def load_network(network: Any, path: str) -> None:
    """Copies a codec's weights out of a folder; transformers knows the older spellings of names.

    Raises:
        FolderError: if some are missing or of another shape.
    """
    try:
        found, report = type(network).from_pretrained(
            path, local_files_only=True, output_loading_info=True, dtype="auto"
        )
        if missing := sorted(report["missing_keys"]):
            raise FolderError(
                f"hf-audio: {path}: {len(missing)} weights are missing, e.g. {missing[0]!r}; copy"
                " the folder again, whole"
            )
        network.load_state_dict(found.state_dict())
        forget_codebooks(network)
    except (OSError, RuntimeError, ValueError) as error:
        raise FolderError(
            f"hf-audio: {path}: its weights do not fit its config.json ({error}); copy the folder"
            " again, whole"
        ) from None


def _alike(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Rows by length."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(length, []).append(row)
    return found
