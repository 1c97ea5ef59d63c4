"""The modality `image`: whatever people call an image, to an RGB picture of 8 bits per channel.

What happens on the way, in this order:
- an animation gives its first frame, EXIF orientation is applied;
- 16-bit and floating-point greys are scaled to 8 bits, not cut off;
- transparency is composited on white;
- grey, palette and CMYK become RGB. Colour profiles are not applied.

Footguns:
- A numpy array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a torch tensor has its channels first.
  Integers count to the top of their type, floats from 0 to 1.
- A URL is fetched only where `XORON_IMAGE_URLS=1` stands in the environment (or `allow_urls=True`):
  a conversation may come from anyone, and would make this process fetch what it likes.
- Larger pictures than Pillow's `Image.MAX_IMAGE_PIXELS` are refused: possible decompression bombs.

Imports neither torch nor Pillow before an image is loaded.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xoron_core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

URLS_ALLOWED = "XORON_IMAGE_URLS"
URL_SECONDS = 20
URL_BYTES = 64_000_000
_TOO_LARGE = (
    "the image is too large ({}); scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you"
    " trust it"
)
_WHITE = (255, 255, 255, 255)
_FORMS = (
    "expected a path, bytes, a PIL image, an array (H, W, C) or a tensor (C, H, W), as integers or"
    " as floats from 0 to 1"
)


def load_image(source: Any, *, allow_urls: bool | None = None) -> Image.Image:
    """Loads one image.

    Args:
        source: a path, the bytes of a file, a PIL image, a numpy array (H, W[, C]), a torch tensor
            ([C,] H, W), a `data:` or http(s) URL, or a mapping with `url` as chat messages hold it.
        allow_urls: whether http(s) may be used; None asks the environment.

    Returns:
        A PIL image of mode RGB; the caller's own if it is upright RGB already.

    Raises:
        DataError: naming the file (or the kind of object) and what is wrong with it.
    """
    from PIL import Image

    if isinstance(source, Mapping):
        source = source.get("url")
    if isinstance(source, Image.Image):
        return _open(source, "PIL image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), f"image of {len(source)} bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _open(io.BytesIO(_data_url(source)), "data: URL")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _open(io.BytesIO(_fetch(source, allow_urls)), source)
    if isinstance(source, str | Path):
        return _open(Path(source), str(source))
    if hasattr(source, "__array__"):
        return _to_rgb(Image.fromarray(_pixels(source)))
    raise DataError(f"no image in an object of type {type(source).__name__}; {_FORMS}")


def sample_image(seed: int, size: int) -> np.ndarray:
    """A made-up image: (32, 32 * size, 3) uint8, for checks and diagnoses."""
    import numpy as np

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8 * size, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=0).repeat(4, axis=1)


def _open(file: io.BytesIO | Path | Image.Image, name: str) -> Image.Image:
    from PIL import Image

    try:
        if isinstance(file, Image.Image):
            return _decode(file)
        with Image.open(file) as image:
            return _decode(image)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {_TOO_LARGE.format(error)}") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{name}: is no image that Pillow can read") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    # What Pillow's readers raise for damaged files differs from format to format.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(
            f"{name}: the image is damaged or truncated ({error}); replace the file"
        ) from None


def _decode(image: Image.Image) -> Image.Image:
    """The first frame, upright, as RGB."""
    from PIL import ExifTags, Image, ImageOps

    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:  # where Pillow only warns
        raise DataError(_TOO_LARGE.format(f"{pixels:,} pixels, limit {limit:,}"))
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would copy the image
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode.startswith("I") and values.dtype != np.uint16:
            # Pillow opens some 16-bit files as 32-bit integers.
            if values.min() < 0 or values.max() > 65535:
                raise DataError(f"an image of 32-bit integers; {_FORMS}")
            values = values.astype(np.uint16)
        image = Image.fromarray(_eight_bits(values))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), rgba)
    return image.convert("RGB")


def _pixels(source: Any) -> np.ndarray:
    """An array or a tensor to (H, W) or (H, W, 3 or 4) uint8."""
    import numpy as np

    if hasattr(source, "detach"):  # a torch tensor, channels first
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
        array = source.numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    else:
        array = np.asarray(source)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if (array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4))) or not array.size:
        raise DataError(f"no image in an array of shape {tuple(np.shape(source))}; {_FORMS}")
    return np.ascontiguousarray(_eight_bits(array))


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Scales the full range of a type to 0 .. 255."""
    import numpy as np

    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN too
            low, high = float(array.min()), float(array.max())
            raise DataError(f"an image of floats from {low:g} to {high:g}; {_FORMS}")
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    raise DataError(f"an image of {array.dtype} outside 0 to 255; {_FORMS}")


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if head.endswith(";base64"):
            return base64.b64decode(body, validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{url[:40]}...: is no valid data: URL ({error})") from None


def _fetch(url: str, allowed: bool | None) -> bytes:
    if allowed is None:
        allowed = os.environ.get(URLS_ALLOWED) == "1"
    if not allowed:
        raise DataError(
            f"{url}: URLs are not fetched unless allowed; set {URLS_ALLOWED}=1, or download the"
            " image and give its path"
        )
    try:
        with urllib.request.urlopen(url, timeout=URL_SECONDS) as response:  # noqa: S310 - http(s)
            data: bytes = response.read(URL_BYTES + 1)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(f"{url}: cannot be fetched ({error})") from None
    if len(data) > URL_BYTES:
        raise DataError(f"{url}: holds more than {URL_BYTES:,} bytes; download it yourself")
    return data
