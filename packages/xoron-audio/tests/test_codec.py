"""Proves the codec `rvq-audio`: no frame and no sample depends on what comes after it, lengths and
loudness are exact, ids depend neither on the batch nor on a save and load, losses are what they say
and know no padding, codebooks move by the statistics of a step, what does not fit is refused.
"""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank
from transformers.models.dac.modeling_dac import Snake1d

import xoron_core
from xoron_audio.audio import Audio, sample_audio
from xoron_audio.codec.config import RvqAudioConfig
from xoron_audio.codec.network import Snake
from xoron_audio.codec.rvq_audio import RvqAudio
from xoron_audio.codec.spectrum import mel_bands
from xoron_core.components import Context
from xoron_core.errors import ConfigError, DataError

SLOT = "audio.codec"
HOP, Q, C = 160, 3, 256


@pytest.fixture
def tiny(compose):
    return compose("rvq-audio", preset="tiny")


def alike(first, second, tolerance=1e-5):
    return np.abs(first - second).max() <= tolerance


def test_recordings_to_ids_and_back(tiny, media):
    model, processor = tiny
    batch = media(processor, 1, 3, 2)
    codes = model.call(SLOT, "encode", **batch)
    lengths = batch["num_samples"].tolist()
    assert lengths == [(sample_audio(1, s).samples.shape[-1] + 1) // 2 for s in (1, 3, 2)]
    frames = [-(-length // HOP) for length in lengths]
    assert codes.ids.shape == (3, max(frames), Q)
    assert codes.mask.sum(-1).tolist() == frames
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    assert [d.samples.shape for d in decoded] == [(1, length) for length in lengths]
    assert {d.rate for d in decoded} == {8000}
    forward = model.part(SLOT)(**batch)
    assert torch.equal(forward["ids"][codes.mask], codes.ids[codes.mask])
    for row, (length, one) in enumerate(zip(lengths, decoded, strict=True)):
        mine = forward["reconstruction"][row, :, :length] * batch["scale"][row]
        assert alike(mine.detach().clamp(-1, 1).numpy(), one.samples)
        assert not forward["reconstruction"][row, :, length:].any()
        assert one.samples.std() > 0


def test_no_frame_sees_what_comes_after_it(tiny):
    part = tiny[0].part(SLOT).double()
    samples = torch.randn(1, 1, 10 * HOP, generator=torch.Generator().manual_seed(0)).double()
    frames = part.encoder(samples)
    for t in (1, 4, 9):
        torch.testing.assert_close(part.encoder(samples[..., : t * HOP]), frames[..., :t])
        last = samples.clone()
        last[..., t * HOP - 1] += 1
        changed = (part.encoder(last) - frames).abs().amax(1)[0]
        assert not changed[: t - 1].any()
        assert changed[t - 1] > 0


def test_no_sample_comes_of_frames_after_it(tiny):
    model, _ = tiny
    ids = torch.randint(C, (1, 10, Q), generator=torch.Generator().manual_seed(0))
    (whole,) = model.call(SLOT, "decode", ids, [{}])
    assert whole.samples.shape == (1, 10 * HOP)
    for t in (1, 4, 9):
        (part,) = model.call(SLOT, "decode", ids[:, :t], [{}])
        assert alike(part.samples, whole.samples[:, : t * HOP], 1e-6)


def test_loudness_is_in_the_metadata_and_not_in_the_ids(tiny):
    model, processor = tiny
    recording = sample_audio(1, 3)
    media = [Audio(recording.samples * np.float32(gain), recording.rate) for gain in (1, 0.05)]
    codes = model.call(SLOT, "encode", **processor.media_batch(SLOT, media))
    assert torch.equal(codes.ids[0], codes.ids[1])
    loud, quiet = (entry["scale"] for entry in codes.metadata)
    assert quiet == pytest.approx(0.05 * loud, rel=1e-4)
    first, second = model.call(SLOT, "decode", codes.ids, codes.metadata)
    assert alike(second.samples, 0.05 * first.samples, 1e-6)
    (made,) = model.call(SLOT, "decode", codes.ids[:1], [{}])
    length = codes.metadata[0]["num_samples"]
    assert alike(made.samples[:, :length] * loud, first.samples)


def test_recordings_enter_at_the_configured_loudness(compose, media):
    for loudness, expected in ((0.1, 0.1), (0.02, 0.02)):
        _, processor = compose("rvq-audio", preset="tiny", loudness=loudness)
        batch = media(processor, 2)
        length = int(batch["num_samples"])
        level = batch["samples"][0, 0, :length].square().mean().sqrt()
        assert float(level) == pytest.approx(expected, rel=1e-4)
    _, processor = compose("rvq-audio", preset="tiny", loudness=None)
    batch = media(processor, 2)
    assert batch["scale"].tolist() == [1.0]
    silence = Audio(np.zeros((1, 800), np.float32), 8000)
    _, processor = compose("rvq-audio", preset="tiny")
    batch = processor.media_batch(SLOT, [silence])
    assert torch.isfinite(batch["samples"]).all()


def test_ids_do_not_depend_on_the_batch(tiny, media):
    model, processor = tiny
    batch = media(processor, 1, 4, 2, 4)
    whole = model.call(SLOT, "encode", **batch)
    for row, size in enumerate((1, 4, 2, 4)):
        own = processor.media_batch(SLOT, [sample_audio(row + 1, size)])
        alone = model.call(SLOT, "encode", **own)
        T = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], whole.ids[row, :T])
        assert alone.metadata[0] == whole.metadata[row]
    assert not torch.equal(whole.ids[1], whole.ids[3])


def train(model, batch, *, steps):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        output = model(media={SLOT: batch})
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step({SLOT: output.outputs[SLOT]["statistics"]})
    model.eval()


def test_a_model_folder_gives_the_same_ids_and_recordings(tiny, media, tmp_path):
    model, processor = tiny
    batch = media(processor, 2, 3)
    train(model, batch, steps=2)
    model.save_pretrained(tmp_path)
    again, _ = xoron_core.load(tmp_path)
    codes = [m.eval().call(SLOT, "encode", **batch) for m in (model, again)]
    assert torch.equal(codes[0].ids, codes[1].ids)
    assert len(codes[0].ids.unique()) > 5
    first, second = (m.call(SLOT, "decode", codes[0].ids, []) for m in (model, again))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


def test_codebooks_move_by_statistics_alone(tiny, media):
    model, processor = tiny
    batch = media(processor, 2, 3)
    codec = model.part(SLOT).train()
    before = [book.codebook.clone() for book in codec.quantizer.quantizers]
    output = codec(**batch)
    for book, old in zip(codec.quantizer.quantizers, before, strict=True):
        assert torch.equal(book.codebook, old)
    codec.after_optimizer_step(output["statistics"])
    for book, old in zip(codec.quantizer.quantizers, before, strict=True):
        assert not torch.equal(book.codebook, old)
    found = codec.metrics(output["statistics"])
    assert set(found) == {f"code_entropy_{q}" for q in range(Q)}
    assert all(0 <= value < 1 for value in found.values())
    # Padding is not counted.
    frames = int(codec.frame_mask(batch["samples"], batch["num_samples"]).sum())
    assert float(output["statistics"]["0.counts"].sum()) == frames
    assert "statistics" not in codec.eval()(**batch)
    assert "statistics" not in codec.train().requires_grad_(False)(**batch)


def test_dropout_leaves_codebooks_out_of_training_and_never_of_ids(compose, media):
    model, processor = compose("rvq-audio", preset="tiny", dropout=1.0)
    batch = media(processor, 1, 1, 1, 1, 1, 1, 1, 1)
    codec = model.part(SLOT).train()
    ids = codec(**batch)["ids"]
    assert (ids[..., 0] >= 0).all()
    assert (ids[..., 2] < 0).any()
    assert (codec.encode(**batch).ids >= 0).all()


def test_losses_are_what_they_say(compose, media):
    windows, weights = [64, 256], {"waveform_weight": 0.5, "spectrum_weight": 2.0}
    model, processor = compose("rvq-audio", preset="tiny", mel_windows=windows, **weights)
    batch = media(processor, 3)
    codec = model.part(SLOT)
    output = codec(**batch)
    terms = codec.aux_losses(output, batch)
    length = int(batch["num_samples"])
    ours, target = (
        each[0, 0, :length].detach().numpy()
        for each in (output["reconstruction"], batch["samples"])
    )
    found = {name: float(term.sum.detach() / term.count) for name, term in terms.items()}
    assert found["waveform"] == pytest.approx(0.5 * np.abs(ours - target).mean() / 0.1, rel=1e-4)
    spectra = [log_mel_by_hand(ours, w) - log_mel_by_hand(target, w) for w in windows]
    total = sum(np.abs(each).sum() for each in spectra)
    count = sum(each.size for each in spectra)
    assert found["spectrum"] == pytest.approx(2 * total / count, rel=1e-3)
    with torch.no_grad():
        hidden = codec.encoder(batch["samples"] / 0.1).transpose(1, 2)
        left, distances = hidden, []
        for book, ids in zip(codec.quantizer.quantizers, output["ids"].unbind(-1), strict=True):
            left = left - book.codebook[ids]
            distances.append(left.square().mean(-1))
    assert found["commitment"] == pytest.approx(
        0.25 * float(torch.stack(distances).mean()), rel=1e-4
    )
    counts = codec.aux_counts(batch)
    assert {name: float(term.count) for name, term in terms.items()} == {
        name: float(value) for name, value in counts.items()
    }


def log_mel_by_hand(samples, window):
    """Frames a quarter of a window apart, from half a window before the beginning to the end."""
    padded = np.pad(samples, (window // 2, window)).astype(np.float64)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(samples) + window // 2, window // 4)
    frames = np.stack([padded[start : start + window] * hann for start in starts])
    magnitudes = np.abs(np.fft.rfft(frames)) * 2 / hann.sum()
    frequencies = np.linspace(0, 4000, window // 2 + 1)
    mels = 2595 * np.log10(1 + frequencies / 700)
    corners = np.linspace(0, mels[-1], window // 8 + 2)
    bands = np.clip(1 - np.abs(mels[:, None] - corners[1:-1]) / corners[1], 0, None)
    bands = bands[:, bands.sum(0) > 0]
    return np.log(np.maximum(magnitudes @ bands, 1e-4))


def test_losses_of_a_padded_batch_are_those_of_its_items(tiny, media):
    model, processor = tiny
    codec = model.part(SLOT)
    terms = codec.aux_losses(codec(**(b := media(processor, 1, 4))), b)
    alone = []
    for seed, size in ((1, 1), (2, 4)):
        own = processor.media_batch(SLOT, [sample_audio(seed, size)])
        alone.append(codec.aux_losses(codec(**own), own))
    for name, term in terms.items():
        total = sum(float(part[name].sum.detach()) for part in alone)
        assert float(term.sum.detach()) == pytest.approx(total, rel=1e-4)
        assert float(term.count) == sum(float(part[name].count) for part in alone)


def test_mel_bands_equal_those_of_transformers():
    expected = mel_filter_bank(
        num_frequency_bins=129,
        num_mel_filters=32,
        min_frequency=0.0,
        max_frequency=4000.0,
        sampling_rate=8000,
        mel_scale="htk",
        triangularize_in_mel_space=True,
    )
    np.testing.assert_allclose(mel_bands(256, 8000).numpy(), expected, atol=1e-6)


def test_snake_equals_that_of_dac():
    ours, theirs = Snake(5), Snake1d(5)
    with torch.no_grad():
        ours.log_alpha.copy_(torch.randn(5, 1, generator=torch.Generator().manual_seed(0)))
        theirs.alpha.copy_(ours.log_alpha.exp()[None])
    x = torch.randn(2, 5, 30)
    torch.testing.assert_close(ours(x), theirs(x))


def test_ids_samples_and_metadata_that_do_not_fit_are_refused(tiny):
    model, _ = tiny
    ids = torch.zeros(1, 4, Q, dtype=torch.int64)
    for wrong, words in (
        (ids + C, f"expected 0 to {C - 1}"),
        (ids - 1, "ids from -1"),
        (ids[..., :2], r"expected \(items, frames, 3\)"),
        (ids[:, :0], "at least one frame"),
    ):
        with pytest.raises(DataError, match=words):
            model.call(SLOT, "decode", wrong, [{}])
    for metadata, words in (
        ({"num_samples": 4 * HOP + 1}, "belong to other ids"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": "loud"}, "scale is 'loud'"),
    ):
        with pytest.raises(DataError, match=words):
            model.call(SLOT, "decode", ids, [metadata])
    with pytest.raises(DataError, match="2 metadata for 1 items"):
        model.call(SLOT, "decode", ids, [{}, {}])
    with pytest.raises(DataError, match=r"expected \(items, 1, samples\)"):
        model.part(SLOT).encode(
            torch.zeros(1, 2, HOP), num_samples=torch.tensor([HOP]), scale=torch.ones(1)
        )


def test_ranges_say_rate_and_delay(compose):
    plain = RvqAudio.ranges(RvqAudioConfig())
    assert [(r.size, r.rate, r.delay) for r in plain] == [(1024, 75.0, 0)] * 4
    delayed = RvqAudio.ranges(RvqAudioConfig(pattern="delay"))
    assert [r.delay for r in delayed] == [0, 1, 2, 3]
    assert RvqAudio.frame_limits(RvqAudioConfig(max_seconds=2.0)) == (1, 150)


def test_the_published_size():
    config = RvqAudioConfig()
    with torch.device("meta"):
        part = RvqAudio(config, Context(SLOT))
    assert (config.rate, config.hop) == (24000, 320)
    assert sum(p.numel() for p in part.parameters()) == 38_042_881
    assert [b.codebook.shape for b in part.quantizer.quantizers] == [(1024, 128)] * 4


def test_configs_that_make_no_codec_are_refused():
    with pytest.raises(ConfigError, match="2 widths for 4 strides"):
        RvqAudioConfig.parse({"widths": [8, 16]})
    with pytest.raises(ConfigError, match="mel_windows has 30"):
        RvqAudioConfig.parse({"mel_windows": [64, 30]})


def test_other_sizes_are_another_identity():
    base = RvqAudioConfig()
    changes = [
        {"sampling_rate": 16000}, {"strides": (2, 4, 8, 5)}, {"dilations": (1, 3)},
        {"loudness": 0.2}, {"loudness": None}, {"num_codebooks": 2}, {"codebook_size": 64},
        {"activation": "elu"}, {"code_dim": 64}, {"kernel_size": 5},
    ]  # fmt: skip
    identities = {base.identity, *(RvqAudioConfig(**change).identity for change in changes)}
    assert len(identities) == len(changes) + 1
    assert RvqAudioConfig(spectrum_weight=2.0, pattern="delay").identity == base.identity
