"""`token_space.json`: canonical text, the hash of its meaning, strict reading.

The hash covers what ids mean: the text base (name, size, identity, own specials, normalisation),
every special token and codec range with its place, and which of them are holes. It covers no
time, path, device, padding or key order, and not the `hidden` marks.

A codec's `delay` is written where it is not 0, so that the files and hashes of spaces without one
are those of earlier versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xoron_core.errors import FolderError, TokenSpaceError, did_you_mean
from xoron_core.tokens.ranges import CodecEntry, CodecRange, Special, TextBase

if TYPE_CHECKING:
    from xoron_core.tokens.space import TokenSpace

FORMAT = 1
_TEXT = {
    "name": str,
    "size": int,
    "identity": str,
    "owned": dict,
    "normalization": (str, type(None)),
}
_SPECIAL = {
    "group": str,
    "name": str,
    "string": str,
    "id": int,
    "hidden": bool,
    "alias": bool,
    "removed": bool,
}
_CODEC = {
    "name": str,
    "codebook": int,
    "size": int,
    "identity": str,
    "rate": (int, float, type(None)),
    "modality": str,
    "delay": int,
    "start": int,
    "removed": bool,
}
_TOP = {
    "format": int,
    "hash": str,
    "rows": int,
    "text": (dict, type(None)),
    "specials": list,
    "codecs": list,
}


def meaning_hash(space: TokenSpace) -> str:
    """Returns `sha256:` and 64 hexadecimal digits."""
    content = _content(space)
    for special in content["specials"]:
        del special["hidden"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"


def dump(space: TokenSpace) -> str:
    """Returns the canonical text: sorted keys, one entry a line."""
    fields: dict[str, Any] = _content(space) | {"hash": space.hash, "rows": space.size}
    parts = []
    for key in sorted(fields):
        value = fields[key]
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(item, sort_keys=True) for item in value)
            parts.append(f' "{key}": [\n  {lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, sort_keys=True)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _content(space: TokenSpace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "text": None if space.text is None else _pick(space.text, _TEXT),
        "specials": [_pick(special, _SPECIAL) for special in space.specials],
        "codecs": [_codec(entry) for entry in space.codecs],
    }


def _codec(entry: CodecEntry) -> dict[str, Any]:
    asked = _pick(entry.range, {k: v for k, v in _CODEC.items() if k not in ("start", "removed")})
    if not asked["delay"]:
        del asked["delay"]
    return asked | {"start": entry.start, "removed": entry.removed}


def _pick(entry: object, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in names}


def parse(text: str, where: str) -> dict[str, Any]:
    """Reads the JSON text into checked fields; see `TokenSpace.from_json`."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise FolderError(
            f"{where}: not valid JSON at line {error.lineno} ({error.msg}); the file is truncated"
            " or damaged, copy it again"
        ) from None
    if not isinstance(fields, dict) or "format" not in fields:
        raise TokenSpaceError(f"{where}: not a token space: it has no 'format'")
    if fields["format"] != FORMAT:
        raise TokenSpaceError(
            f"{where}: token space format {fields['format']!r}, this xoron-core reads {FORMAT};"
            " upgrade with: pip install -U xoron-core"
        )
    _check_fields(fields, _TOP, where)
    return fields


def entries(
    fields: Mapping[str, Any], where: str
) -> tuple[TextBase | None, tuple[Special, ...], tuple[CodecEntry, ...]]:
    """Makes the entries of a space from parsed fields."""
    text = None
    if fields["text"] is not None:
        _check_fields(fields["text"], _TEXT, f"{where}: text")
        text = TextBase(**fields["text"])
    specials = []
    for index, special in enumerate(fields["specials"]):
        _check_fields(special, _SPECIAL, f"{where}: specials[{index}]")
        specials.append(Special(**special))
    codecs = []
    for index, codec in enumerate(fields["codecs"]):
        rest = {"delay": 0, **codec} if isinstance(codec, dict) else codec
        _check_fields(rest, _CODEC, f"{where}: codecs[{index}]")
        start, removed = rest.pop("start"), rest.pop("removed")
        codecs.append(CodecEntry(CodecRange(**rest), start, removed))
    return text, tuple(specials), tuple(codecs)


def check_hash(fields: Mapping[str, Any], space: TokenSpace, where: str) -> None:
    """Refuses a file whose hash or row count does not follow from its content."""
    if fields["hash"] != space.hash:
        raise TokenSpaceError(
            f"{where}: says its hash is {fields['hash']}, but its content has {space.hash}; it was"
            " changed after it was written. Restore the file."
        )
    if fields["rows"] != space.size:
        raise TokenSpaceError(
            f"{where}: says it has {fields['rows']} rows, but its content has {space.size}."
            " Restore the file."
        )


def _check_fields(data: Any, expected: Mapping[str, Any], where: str) -> None:
    if not isinstance(data, dict):
        raise TokenSpaceError(f"{where}: expected a mapping, got {type(data).__name__}")
    for key in data:
        if key not in expected:
            raise TokenSpaceError(f"{where}: unknown key {key!r}.{did_you_mean(key, expected)}")
    for key, kind in expected.items():
        if key not in data:
            raise TokenSpaceError(f"{where}: {key!r} is missing")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # JSON's true is a Python int as well; it must not pass for one.
        if type(data[key]) not in kinds:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise TokenSpaceError(f"{where}: {key!r} must be {names}, got {data[key]!r}")


def save(path: Path, text: str) -> None:
    """Writes beside `path`, syncs and renames, so that a crash leaves the old file or the new."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise FolderError(f"{path}: could not be written ({error.strerror or error})") from error


def read(path: Path) -> str:
    """Reads the file's text.

    Raises:
        FolderError: if it is missing, unreadable or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FolderError(f"{path}: is not UTF-8 text ({error.reason}); copy it again") from None
    except OSError as error:
        raise FolderError(
            f"{path}: cannot be read ({error.strerror or error}); expected the token space of a"
            " model folder"
        ) from None
