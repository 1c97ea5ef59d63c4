"""Proves that recordings of every form come out as the samples that were put in, at the rate and
with the channels asked for; bad ones name their file and what is wrong.

Expected samples are computed by hand; files are written by the standard library where it can.
"""

import base64
import io
import struct
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile
import torch

from xoron_audio.audio import Audio, converted, load_audio, sample_audio
from xoron_core.errors import DataError

RATE = 16000
PCM = (np.sin(np.arange(400) / 7) * 20000).astype(np.int16)
FLOATS = PCM.astype(np.float32) / 32768


def wav_bytes(pcm=PCM, channels=1, width=2):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    return stream.getvalue()


def written(form, subtype=None, samples=FLOATS):
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=form, subtype=subtype)
    return stream.getvalue()


def tone(hertz, rate, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def test_the_same_recording_in_every_form_has_the_same_samples(tmp_path):
    data = wav_bytes()
    path = tmp_path / "speech.wav"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    url = "data:audio/wav;base64," + text
    forms = [path, str(path), data, bytearray(data), url, {"url": url}, {"path": str(path)}]
    forms += [{"bytes": data, "path": None}, {"data": text, "format": "wav"}]
    forms += [(PCM, RATE), (FLOATS, RATE), Audio(FLOATS[None], RATE), (torch.from_numpy(PCM), RATE)]
    forms += [{"array": FLOATS, "sampling_rate": RATE}, (FLOATS.astype(np.float64), float(RATE))]
    forms += [(PCM.astype(np.int32) * 65536, RATE), (torch.from_numpy(FLOATS).double()[None], RATE)]
    forms += [((PCM.astype(np.int32) + 32768).astype(np.uint16), RATE)]
    for form in forms:
        audio = load_audio(form)
        assert audio.rate == RATE
        assert audio.samples.dtype == np.float32
        np.testing.assert_array_equal(audio.samples, FLOATS[None])
    assert load_audio(data).seconds == 400 / RATE


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1 / 32768),
        ("AIFF", "PCM_16", 1 / 32768),
        ("OGG", "VORBIS", 0.1),
    ],
)
def test_files_of_many_formats(form, subtype, tolerance):
    audio = load_audio(written(form, subtype))
    assert (audio.rate, audio.samples.shape) == (RATE, (1, 400))
    assert np.abs(audio.samples[0] - FLOATS).max() <= tolerance


def test_integers_go_from_minus_one_to_one():
    for dtype, low, zero, high in (
        (np.uint8, 0, 128, 255),
        (np.int16, -(2**15), 0, 2**15 - 1),
        (np.int32, -(2**31), 0, 2**31 - 1),
    ):
        (samples,) = load_audio((np.array([low, zero, high], dtype), 8000)).samples
        assert samples[0] == -1
        assert samples[1] == 0
        assert 0.99 < samples[2] <= 1


def test_channels_are_kept_and_mixed_when_asked():
    left, right = PCM, -PCM // 2
    stereo = load_audio(wav_bytes(np.stack([left, right], 1), channels=2))
    np.testing.assert_array_equal(stereo.samples, np.stack([left, right]) / np.float32(32768))
    np.testing.assert_allclose(
        converted(stereo, RATE, 1), [(stereo.samples[0] + stereo.samples[1]) / 2], atol=1e-7
    )
    mono = load_audio((PCM, RATE))
    np.testing.assert_array_equal(converted(mono, RATE, 2), [FLOATS, FLOATS])
    with pytest.raises(DataError, match="2 channels where 3 are expected"):
        converted(stereo, RATE, 3)


@pytest.mark.parametrize(("source", "target"), [(44100, 8000), (8000, 24000), (16000, 8000)])
def test_a_tone_at_another_rate_is_the_same_tone(source, target):
    samples = converted(Audio(tone(440, source)[None].astype(np.float32), source), target, 1)
    expected = tone(440, target)
    assert samples.shape == (1, len(expected))
    assert samples.dtype == np.float32
    inside = slice(target // 20, -target // 20)  # the filter knows nothing beyond the ends
    assert np.abs(samples[0, inside] - expected[inside]).max() < 1e-3


def test_what_is_too_high_for_a_rate_does_not_come_back_as_something_else():
    samples = converted(Audio(tone(6000, 16000)[None].astype(np.float32), 16000), 8000, 1)
    assert np.abs(samples[0, 400:-400]).max() < 1e-3


def cut_header(declared):
    data = bytearray(wav_bytes())
    data[4:8] = struct.pack("<I", declared)
    data[40:44] = struct.pack("<I", declared)
    return bytes(data)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "is empty"),
        (b"RIFFnonsense", "no audio that libsndfile can read, or damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no audio that libsndfile can read, or damaged"),
        (wav_bytes()[:-100], "truncated"),
        (written("FLAC", samples=tone(440, RATE, 3))[:-4000], "truncated|damaged"),
        (wav_bytes(PCM[:0]), "no audio in an array of shape"),
        (written("WAV", "FLOAT", np.array([0.1, np.nan], np.float32)), "floats up to nan"),
        ((PCM.astype(np.float32), RATE), "floats up to 2e\\+04|floats up to 19999|divide what"),
        ((np.zeros((400, 2, 1)), RATE), "array of shape"),
        ((np.zeros((400, 2)), RATE), "channels come first"),
        ((np.zeros(0), RATE), "no audio in an array"),
        ((PCM, 0), "a rate of 0"),
        ((PCM, None), "a rate of None"),
        (PCM, "without its rate"),
        ((np.array(["a"]), RATE), "array of <U1"),
        ("nowhere.wav", "nowhere.wav: cannot be read"),
        ("https://example.org/a.wav", "URLs are not fetched"),
        ("data:audio/wav;base64", "no comma"),
        ("data:audio/wav;base64,&&&", "no valid base64"),
        ({"sampling_rate": 8000}, "no audio in a mapping with sampling_rate"),
        (3.5, "object of type float"),
    ],
)
def test_what_is_no_audio_is_told(source, words):
    with pytest.raises(DataError, match=words):
        load_audio(source)


def test_a_wav_that_was_written_to_a_pipe_is_whole():
    audio = load_audio(cut_header(0xFFFFFFFF))
    np.testing.assert_array_equal(audio.samples, FLOATS[None])


def test_files_are_named_in_errors(tmp_path):
    path = tmp_path / "cut.wav"
    path.write_bytes(wav_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.wav: the audio is truncated"):
        load_audio(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_audio(tmp_path)


def test_less_than_a_sample_is_refused():
    with pytest.raises(DataError, match="1 samples at 48000 Hz is nothing at 8000"):
        converted(Audio(np.ones((1, 1), np.float32), 48000), 8000, 1)


def test_samples_are_made_up_by_seed_and_size():
    one, again, other = sample_audio(1, 2), sample_audio(1, 2), sample_audio(2, 2)
    np.testing.assert_array_equal(one.samples, again.samples)
    assert not np.array_equal(one.samples, other.samples)
    lengths = [sample_audio(1, size).samples.shape[-1] for size in (1, 2, 3)]
    assert lengths == sorted(set(lengths))
    assert np.abs(one.samples).max() < 1


def test_the_modality_loads_lightly():
    code = (
        "import xoron_audio.audio, sys; print({'torch', 'soundfile', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
