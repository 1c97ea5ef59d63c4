"""Names for media by what they show, not by where they lie.

A medium's digest is taken of what its modality loads: for an image the decoded RGB pixels and their
size. A copy under another name, or in another lossless format, has the same digest; one that was
compressed anew or cropped has not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xoron_core.descriptors import resolve
from xoron_core.errors import PluginError
from xoron_core.sequence import Placed, media_parts

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor

DIGEST_BYTES = 16


def conversation_digests(
    processor: XoronProcessor, messages: Sequence[Mapping[str, Any]]
) -> frozenset[bytes]:
    """The digests of a conversation's media, or of its text where it has none.

    Raises:
        DataError, SequenceError: if a medium cannot be read or is of no known modality.
    """
    if placed := media_parts(messages, processor.modalities):
        return frozenset(media_digests(processor, placed))
    text = json.dumps([dict(message) for message in messages], sort_keys=True, default=str)
    return frozenset([hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()])


def media_digests(processor: XoronProcessor, placed: Iterable[Placed]) -> list[bytes]:
    """The digest of each of these media, in order.

    Raises:
        DataError: if one cannot be read.
    """
    modalities = processor.modalities
    return [
        medium_digest(resolve(modalities[medium.modality].load)(medium.media), medium.modality)
        for medium in placed
    ]


def medium_digest(loaded: Any, modality: str) -> bytes:
    """The digest of one medium as its modality loads it.

    Args:
        loaded: an array, a tensor, a PIL image, or nested mappings and sequences of them.
        modality: media of two modalities never have the same digest.
    """
    digest = hashlib.blake2b(modality.encode(), digest_size=DIGEST_BYTES)
    _update(digest, loaded, modality)
    return digest.digest()


def _update(digest: Any, value: Any, modality: str) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}\0".encode())
            _update(digest, value[key], modality)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}\0".encode())
        for entry in value:
            _update(digest, entry, modality)
    elif isinstance(value, str | bytes | int | float | None):
        digest.update(f"{value!r}\0".encode())
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str}{array.shape}\0".encode())
        digest.update(array.tobytes())
    else:
        raise PluginError(
            f"modality {modality!r} loads objects of type {type(value).__name__}, whose content"
            " cannot be compared: it is no array. Set eval_fraction: 0 and give no golden set, or"
            " ask the plug-in's author to load arrays"
        )
