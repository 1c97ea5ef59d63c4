"""The modality `audio`: whatever people call a recording, to samples from -1 to 1 and their rate.

What happens on the way:
- files are decoded by libsndfile: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and more;
- integers are divided by their full scale, so 16 bits go from -1 to 32767/32768;
- channels stay as they are. How many a component wants, and at what rate, is its processor's
  affair (`converted`): mono is the mean of the channels, and rates are changed by libsoxr.

Footguns:
- An array has its channels first, (C, N) or (N,), also a numpy array; soundfile's (N, C) is refused
  and not guessed. It never comes without its rate: `(array, rate)`.
- Floats may overshoot 1 a little, as loud recordings do. Integers that were cast to floats are
  refused.
- A file that ends before its header says so is refused, where its format tells (WAV, FLAC).
- URLs are not fetched.

Imports neither torch nor soundfile before audio is loaded.

Shapes: C channels, N samples of each.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xoron_core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

# Some recordings overshoot; whoever forgot to divide integers is beyond by orders of magnitude.
LOUDEST = 16.0
MOST_CHANNELS = 32
_FORMS = (
    "expected a path, the bytes of a file, a data: URL, or (array, rate) with an array (N,) or"
    " (C, N) of integers or of floats from -1 to 1"
)
# A WAV that was written to a pipe does not know its length.
_UNKNOWN_LENGTH = (0, 0x7FFFFFFF, 0xFFFFFFFF)


class Audio(NamedTuple):
    """Loaded audio.

    Attributes:
        samples: (C, N) fp32, about -1 to 1.
        rate: samples per second.
    """

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return float(self.samples.shape[-1] / self.rate)


def load_audio(source: Any) -> Audio:
    """Loads one recording.

    Args:
        source: a path; the bytes of a file; `Audio` or `(array, rate)`; a `data:` URL; or a mapping
            as chat messages and data sets hold it: `array` and `sampling_rate`, `bytes`, `path`,
            `url`, or `data` in base64.

    Raises:
        DataError: naming the file (or the kind of object) and what is wrong with it.
    """
    if isinstance(source, Mapping):
        return load_audio(_in_mapping(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(bytes(source), f"audio of {len(source)} bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _decoded(_data_url(source), "data: URL")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError(f"{source}: URLs are not fetched; download the file and give its path")
    if isinstance(source, str | Path):
        return _decoded(_file_bytes(Path(source)), str(source))
    if isinstance(source, tuple | list) and len(source) == 2 and hasattr(source[0], "__array__"):
        return Audio(_samples(source[0]), _rate(source[1]))
    if hasattr(source, "__array__"):
        raise DataError(f"an array of shape {tuple(source.shape)} without its rate; {_FORMS}")
    raise DataError(f"no audio in an object of type {type(source).__name__}; {_FORMS}")


def converted(audio: Audio, rate: int, channels: int) -> np.ndarray:
    """Audio at another rate and with another number of channels.

    Args:
        audio: as `load_audio` gives it.
        rate: samples per second of the result.
        channels: of the result; 1 is the mean, and a single channel is repeated.

    Returns:
        (channels, N') fp32; N' is N * rate / audio.rate, rounded.

    Raises:
        DataError: if channels would have to be invented, or less than a sample is left.
    """
    import numpy as np

    samples = audio.samples
    if channels == 1:
        samples = samples.mean(0, keepdims=True)
    elif len(samples) == 1:
        samples = samples.repeat(channels, 0)
    elif len(samples) != channels:
        raise DataError(
            f"audio of {len(samples)} channels where {channels} are expected; give {channels} or 1"
        )
    if rate != audio.rate:
        import soxr

        samples = soxr.resample(samples.T, audio.rate, rate).T
    if not samples.shape[-1]:
        raise DataError(
            f"audio of {audio.samples.shape[-1]} samples at {audio.rate} Hz is nothing at {rate} Hz"
        )
    return np.ascontiguousarray(samples, dtype=np.float32)


def sample_audio(seed: int, size: int) -> Audio:
    """A made-up recording of about `size` tenths of a second: a gliding tone with overtones and
    noise, two channels for every third seed; for checks and diagnoses."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rate, count = 16000, 1600 * size + 37
    time = np.arange(count) / rate
    pitch = rng.uniform(100, 400) * (1 + rng.uniform(-0.5, 0.5) * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tones = sum(rng.uniform(0.2, 1) * np.sin(k * phase) / k for k in (1, 2, 3, 5))
    channels = 2 if seed % 3 == 0 else 1
    samples = 0.2 * tones + 0.02 * rng.standard_normal((channels, count))
    return Audio(samples.astype(np.float32), rate)


def _in_mapping(source: Mapping[str, Any]) -> Any:
    """The recording of a mapping, in a form without one."""
    if source.get("array") is not None:
        return source["array"], source.get("sampling_rate")
    if source.get("data") is not None:
        return _base64(str(source["data"]), "base64 data")
    for key in ("bytes", "path", "url"):
        if source.get(key) is not None:
            return source[key]
    raise DataError(
        f"no audio in a mapping with {', '.join(map(str, source)) or 'no keys'}; expected 'array'"
        " with 'sampling_rate', 'bytes', 'path', 'url', or 'data' in base64"
    )


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(data: bytes, name: str) -> Audio:
    """The bytes of a file, decoded."""
    import soundfile

    if not data:
        raise DataError(f"{name}: is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            expected, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True).T
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{name}: is no audio that libsndfile can read, or damaged ({error.error_string})"
        ) from None
    if samples.shape[-1] < expected or _is_cut(data):
        raise DataError(f"{name}: the audio is truncated; replace the file")
    try:
        return Audio(_samples(samples), rate)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _is_cut(data: bytes) -> bool:
    """Whether a WAV is shorter than its header says, which libsndfile passes over."""
    declared = int.from_bytes(data[4:8], "little")
    known = data[:4] == b"RIFF" and declared not in _UNKNOWN_LENGTH
    return known and len(data) < declared + 8


def _samples(source: Any) -> np.ndarray:
    """An array or a tensor to (C, N) fp32."""
    import numpy as np

    if hasattr(source, "detach"):  # a torch tensor
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    array = np.asarray(source)
    shape = array.shape
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise DataError(f"no audio in an array of shape {shape}; {_FORMS}")
    if len(array) > MOST_CHANNELS:
        raise DataError(
            f"an array of shape {shape} has {len(array)} channels; channels come first, transpose"
            " it if they are last"
        )
    if np.issubdtype(array.dtype, np.integer):
        return _from_integers(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"no audio in an array of {array.dtype}; {_FORMS}")
    peak = float(np.abs(array).max())
    if not peak <= LOUDEST:  # NaN too
        raise DataError(
            f"floats up to {peak:g}; expected about -1 to 1. Divide what were integers by their"
            " full scale"
        )
    return array.astype(np.float32)


def _from_integers(array: np.ndarray) -> np.ndarray:
    """Integers to -1 to 1; unsigned ones have their zero in the middle."""
    import numpy as np

    half = 2.0 ** (8 * array.dtype.itemsize - 1)
    zero = half if np.issubdtype(array.dtype, np.unsignedinteger) else 0.0
    return ((array.astype(np.float64) - zero) / half).astype(np.float32)


def _rate(rate: Any) -> int:
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate < 1 or rate != int(rate):
        raise DataError(f"a rate of {rate!r}; expected samples per second, such as 16000")
    return int(rate)


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise DataError(f"{url[:40]}...: is no valid data: URL (it has no comma)")
    if head.endswith(";base64"):
        return _base64(body, f"{url[:40]}...")
    return urllib.parse.unquote_to_bytes(body)


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{name}: is no valid base64 ({error})") from None
