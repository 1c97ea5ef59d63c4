"""Proves that `hf-audio` gives the ids and recordings of transformers' own EnCodec, DAC and Mimi,
from config data and from folders; that EnCodec's chunks take the positions they are said to take
and are not decoded without their scales; and that what is missing is told.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import xoron_core
from xoron_audio.audio import Audio, sample_audio
from xoron_audio.codec.hf_audio import HfAudio, build_network
from xoron_audio.codec.hf_config import HfAudioConfig
from xoron_core.errors import ConfigError, DataError, FolderError

SLOT = "audio.codec"
NETWORKS = {
    "encodec": {
        "sampling_rate": 8000,
        "upsampling_ratios": [5, 4, 4],
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 64,
        "num_lstm_layers": 1,
        "target_bandwidths": [1.2, 2.4],
    },
    "dac": {
        "sampling_rate": 8000,
        "encoder_hidden_size": 4,
        "downsampling_ratios": [4, 4, 5],
        "decoder_hidden_size": 32,
        "n_codebooks": 3,
        "codebook_size": 64,
        "codebook_dim": 4,
    },
    "mimi": {
        "sampling_rate": 8000,
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [5, 4],
        "codebook_size": 64,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
    },
}
# The chunks of facebook/encodec_48khz, around a network of a few channels.
CHUNKED = {
    "sampling_rate": 48000,
    "audio_channels": 2,
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
    "upsampling_ratios": [8, 5, 4, 2],
    "norm_type": "time_group_norm",
    "use_causal_conv": False,
    "num_filters": 2,
    "hidden_size": 8,
    "codebook_size": 1024,
    "num_lstm_layers": 1,
}
KINDS = tuple(NETWORKS)


def theirs(kind, **changes):
    """One of transformers' codecs, whose random weights tell sounds apart."""
    torch.manual_seed(1)
    config = HfAudioConfig.parse({"network": {"model_type": kind, **NETWORKS[kind], **changes}})
    network = build_network(config)
    lively(network)
    return network


@torch.no_grad()
def lively(network):
    """Larger weights and codes near what the encoder gives: fresh ones give one id throughout."""
    for name, tensor in network.state_dict().items():
        if name.rpartition(".")[2] in ("embed", "embed_sum"):
            tensor.mul_(0.3)
        elif "encoder" in name and name.endswith("bias"):
            tensor.zero_()
        elif "encoder" in name and name.endswith(("original0", "alpha")):
            tensor.mul_(1.5)


@torch.no_grad()
def their_ids(network, kind, samples):
    """(T, Q) of one recording (C, N)."""
    x = samples[None]
    if kind == "dac":
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 80))
    codes = network.encode(x).audio_codes if kind != "encodec" else None
    if codes is None:
        codes = network.encode(x, bandwidth=2.4).audio_codes[0]
    return codes[0].T


@torch.no_grad()
def their_samples(network, kind, ids):
    """(C, L) of the ids (T, Q) of one recording."""
    codes = ids.T[None]
    if kind == "dac":
        return network.decode(audio_codes=codes).audio_values
    if kind == "mimi":
        return network.decode(codes).audio_values[0]
    return network.decode(codes[None], [None]).audio_values[0]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_recordings_are_transformers_own(kind, compose, media, tmp_path):
    network = theirs(kind)
    network.save_pretrained(tmp_path / "source")
    model, processor = compose("hf-audio", path=str(tmp_path / "source"))
    batch = media(processor, 1, 4, 2, 4)
    codes = model.call(SLOT, "encode", **batch)
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    different = set()
    for row, length in enumerate(batch["num_samples"].tolist()):
        own = batch["samples"][row, :, :length]
        expected = their_ids(network, kind, own)
        assert torch.equal(codes.ids[row][codes.mask[row]], expected)
        different |= set(expected.flatten().tolist())
        item = {"samples": own.numpy()}
        assert processor.processors[SLOT].num_positions(item) == len(expected)
        samples = their_samples(network, kind, expected)[:, :length].clamp(-1, 1).numpy()
        assert decoded[row].samples.shape == (1, length)
        np.testing.assert_allclose(decoded[row].samples[:, : samples.shape[-1]], samples, atol=1e-5)
    assert len(different) > 5
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    again, _ = xoron_core.load(tmp_path / "model")
    assert torch.equal(again.call(SLOT, "encode", **batch).ids, codes.ids)
    remade = again.call(SLOT, "decode", codes.ids, codes.metadata)
    np.testing.assert_array_equal(remade[1].samples, decoded[1].samples)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_exact_at_every_length(kind, compose):
    model, processor = compose("hf-audio", network={"model_type": kind, **NETWORKS[kind]})
    own = processor.processors[SLOT]
    for length in (1, 39, 40, 41, 79, 80, 81, 399, 400, 401):
        item = own.load(Audio(np.full((1, length), 0.1, np.float32), 8000))
        codes = model.call(SLOT, "encode", **own.collate([item]))
        assert codes.mask.sum() == codes.ids.shape[1] == own.num_positions(item)
        (one,) = model.call(SLOT, "decode", codes.ids, codes.metadata)
        assert one.samples.shape == (1, length)


@pytest.mark.parametrize(("kind", "fewer"), [("encodec", 2), ("dac", 1), ("mimi", 3)])
def test_fewer_codebooks_are_the_first_ones(kind, fewer, compose, media):
    network = {"model_type": kind, **NETWORKS[kind]}
    (every, processor), (some, _) = (
        compose("hf-audio", network=network, **more) for more in ({}, {"num_codebooks": fewer})
    )
    some.load_state_dict(every.state_dict())
    batch = media(processor, 2, 2)
    whole, part = (m.call(SLOT, "encode", **batch) for m in (every, some))
    assert torch.equal(part.ids, whole.ids[..., :fewer])
    assert len(HfAudio.ranges(some.part(SLOT).config)) == fewer


@pytest.fixture
def chunked(compose):
    network = {"model_type": "encodec", **CHUNKED}
    model, processor = compose("hf-audio", network=network, num_codebooks=4)
    lively(model.part(SLOT).network)
    return model, processor


def stereo(seconds, rate=48000):
    rng = np.random.default_rng(0)
    count = int(seconds * rate)
    loud = np.linspace(0.02, 0.3, count)
    return Audio((rng.standard_normal((2, count)) * loud).astype(np.float32).clip(-1, 1), rate)


def test_ten_seconds_in_chunks_are_6600_ids_and_11_scales(chunked):
    model, processor = chunked
    recording, own = stereo(10), processor.processors[SLOT]
    item = own.load(recording)
    assert own.num_positions(item) == 11 * 150
    assert HfAudio.ranges(model.part(SLOT).config)[0].rate is None
    codes = model.call(SLOT, "encode", **own.collate([item]))
    assert codes.ids[codes.mask].numel() == 6600
    assert len(codes.metadata[0]["scales"]) == 11
    assert len(codes.ids.unique()) > 5

    network = model.part(SLOT).network
    extract = transformers.EncodecFeatureExtractor(
        feature_size=2, sampling_rate=48000, chunk_length_s=1.0, overlap=0.01
    )
    inputs = extract(recording.samples, sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        found = network.encode(**inputs, bandwidth=6.0)
        chunks, scales = found.audio_codes[:11], found.audio_scales[:11]
        # Behind the eleventh chunk there is padding alone, where transformers goes on at all.
        samples = network.decode(chunks, scales).audio_values[0, :, :480000]
    assert torch.equal(codes.ids[0], chunks[:, 0].transpose(1, 2).flatten(0, 1))
    expected = [float(scale) for scale in scales]
    assert codes.metadata[0]["scales"] == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 3 * min(expected)
    (decoded,) = model.call(SLOT, "decode", codes.ids, codes.metadata)
    assert decoded.samples.shape == (2, 480000)
    np.testing.assert_allclose(decoded.samples, samples.clamp(-1, 1).numpy(), atol=1e-5)
    assert decoded.samples.std() > 0


def test_chunks_are_not_decoded_without_their_metadata(chunked):
    model, processor = chunked
    assert HfAudio.needs_metadata(model.part(SLOT).config)
    batch = processor.media_batch(SLOT, [stereo(1.5), stereo(0.3)])
    codes = model.call(SLOT, "encode", **batch)
    assert codes.mask.sum(-1).tolist() == [300, 150]
    both = model.call(SLOT, "decode", codes.ids, codes.metadata)
    assert [each.samples.shape[-1] for each in both] == [72000, 14400]
    (alone,) = model.call(SLOT, "decode", codes.ids[1:, :150], codes.metadata[1:])
    np.testing.assert_allclose(alone.samples, both[1].samples, atol=1e-6)
    without = [{k: v for k, v in entry.items() if k != "scales"} for entry in codes.metadata]
    short = [codes.metadata[0] | {"scales": [1.0]}, codes.metadata[1]]
    for ids, wrong, words in (
        (codes.ids, [{}, {}], "num_samples is None"),
        (codes.ids, without, "scales is None, expected the 2 numbers"),
        (codes.ids, short, r"scales is \[1.0\], expected the 2 numbers"),
        (codes.ids[1:, :150], codes.metadata[:1], "num_samples is 72000 for 150 frames"),
    ):
        with pytest.raises(DataError, match=words):
            model.call(SLOT, "decode", ids, wrong)


def test_chunks_of_one_recording_stay_together(chunked):
    model, processor = chunked
    recordings = [stereo(1.5), Audio(stereo(1.5).samples[::-1].copy() / 2, 48000)]
    both = model.call(SLOT, "encode", **processor.media_batch(SLOT, recordings))
    assert not torch.equal(both.ids[0], both.ids[1])
    for row, recording in enumerate(recordings):
        alone = model.call(SLOT, "encode", **processor.media_batch(SLOT, [recording]))
        assert torch.equal(alone.ids[0], both.ids[row])
        assert both.metadata[row]["scales"] == pytest.approx(alone.metadata[0]["scales"])
    decoded = model.call(SLOT, "decode", both.ids, both.metadata)
    for row, one in enumerate(decoded):
        (alone,) = model.call(SLOT, "decode", both.ids[row : row + 1], [both.metadata[row]])
        np.testing.assert_allclose(alone.samples, one.samples, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_saved_is_made_again(kind, compose, media):
    model, processor = compose("hf-audio", network={"model_type": kind, **NETWORKS[kind]})
    part, batch = model.part(SLOT), media(processor, 1, 2)
    lively(part.network)
    ids = part.encode(**batch).ids
    saved = part.state_dict()
    for name, buffer in part.named_buffers():
        if name not in saved:
            buffer.fill_(3)
    part.reset_buffers()
    assert torch.equal(part.encode(**batch).ids, ids)


def test_mono_enters_a_stereo_codec_twice(chunked):
    _, processor = chunked
    batch = processor.media_batch(SLOT, [sample_audio(1, 2)])
    assert batch["samples"].shape[1] == 2
    assert torch.equal(batch["samples"][:, 0], batch["samples"][:, 1])


def test_sizes_are_those_of_the_published_checkpoints():
    def of(kind, **network):
        return HfAudioConfig.parse({"network": {"model_type": kind, **network}})

    full = {k: v for k, v in CHUNKED.items() if k not in ("num_filters", "hidden_size")}
    for config, rate, hop, codebooks in (
        (of("encodec"), 24000, 320, (2, 4, 8, 16, 32)),
        (of("encodec", **full), 48000, 320, (2, 4, 8, 16)),
        (of("dac"), 16000, 512, tuple(range(1, 10))),
        (of("mimi"), 24000, 1920, tuple(range(1, 33))),
    ):
        assert (config.rate, config.hop, config.possible_codebooks) == (rate, hop, codebooks)
        cls = getattr(transformers, f"{config.model_type.capitalize()}Config")
        made = cls(**{k: v for k, v in config.network.items() if k != "model_type"})
        assert (made.sampling_rate, made.codebook_size) == (rate, config.codebooks[1])
        assert hop == (rate / made.frame_rate if config.model_type == "mimi" else made.hop_length)
    assert of("encodec", **full).chunk == (48000, 47520)
    assert of("encodec", **full).chunk_frames == 150


def test_what_is_missing_or_does_not_fit_is_told(compose, tmp_path):
    with pytest.raises(ConfigError, match="hf-audio needs path"):
        HfAudioConfig.parse({})
    with pytest.raises(ConfigError, match="expected one of encodec, dac, mimi"):
        HfAudioConfig.parse({"network": {"model_type": "wav2vec2"}})
    with pytest.raises(ConfigError, match="num_codebooks is 3, but this encodec can use 2, 4, 8"):
        HfAudioConfig.parse({"network": {"model_type": "encodec"}, "num_codebooks": 3})
    with pytest.raises(ConfigError, match="no overlap"):
        HfAudioConfig.parse({"network": {"model_type": "encodec", "chunk_length_s": 1.0}})
    with pytest.raises(ConfigError, match="cannot be read"):
        compose("hf-audio", path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="is of 'bert'"):
        compose("hf-audio", path=str(tmp_path))
    with pytest.raises(ConfigError, match="network makes no DacModel"):
        compose("hf-audio", network={"model_type": "dac", "codebook_size": 65})
    network = theirs("dac")
    network.config.save_pretrained(tmp_path)
    with pytest.raises(FolderError, match=r"no \*.safetensors"):
        compose("hf-audio", path=str(tmp_path))
    network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != first}, tmp_path / "model.safetensors")
    with pytest.raises(FolderError, match="1 weights are missing"):
        compose("hf-audio", path=str(tmp_path))
    save_file(weights | {first: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(FolderError, match="copy the folder again"):
        compose("hf-audio", path=str(tmp_path))
