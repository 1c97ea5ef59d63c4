"""The structure of a token space: every id belongs to exactly one named thing.

All checks run when a space is made, so no invalid space exists.
"""

from __future__ import annotations

from collections.abc import Sequence

from xoron_core.errors import TokenSpaceError
from xoron_core.tokens.ranges import CodecEntry, Special, TextBase, check_integer, check_name


def verify_entries(
    text: TextBase | None, specials: Sequence[Special], codecs: Sequence[CodecEntry]
) -> None:
    """Raises TokenSpaceError for the first thing that is wrong; see `TokenSpace.verify`."""
    _check_specials(text, specials)
    _check_codebooks(codecs)
    _check_tiling(text, specials, codecs)


def _check_specials(text: TextBase | None, specials: Sequence[Special]) -> None:
    owned = text.owned if text is not None else {}
    keys: set[str] = set()
    strings: dict[str, str] = {}
    for special in specials:
        check_name(special.group, "a group of special tokens")
        check_integer(special.id, f"id of special token {special.key!r}", least=0)
        if not isinstance(special.name, str) or not special.name:
            raise TokenSpaceError(f"a special token of {special.group!r} has no name")
        if not isinstance(special.string, str) or not special.string:
            raise TokenSpaceError(f"special token {special.key!r} has an empty string")
        if not special.string[0].isprintable() or special.string[0] in ' "\\':
            # JSON would escape it, so that it could not be told from text in tool arguments.
            raise TokenSpaceError(
                f"special token {special.key!r} is written {special.string!r}; it must not begin"
                " with white space, a quote or a backslash"
            )
        if special.key in keys:
            raise TokenSpaceError(f"special token {special.key!r} stands twice; keep one")
        keys.add(special.key)
        _check_alias(text, owned.get(special.string), special)
        if special.removed:
            continue
        if (other := strings.get(special.string)) is not None:
            raise TokenSpaceError(
                f"special tokens {other!r} and {special.key!r} are both written"
                f" {special.string!r}; rename one of them"
            )
        strings[special.string] = special.key


def _check_alias(text: TextBase | None, owned_id: int | None, special: Special) -> None:
    base = text.name if text is not None else "no text base"
    if special.alias and (special.removed or owned_id != special.id):
        raise TokenSpaceError(
            f"special token {special.key!r} is an alias to id {special.id}, but {special.string!r}"
            f" has id {owned_id} in {base!r}"
        )
    if not special.alias and owned_id is not None:
        raise TokenSpaceError(
            f"special token {special.key!r} has id {special.id} of its own, but {base!r} already"
            f" owns {special.string!r} at {owned_id}; it must be an alias"
        )


def _check_codebooks(codecs: Sequence[CodecEntry]) -> None:
    books: dict[str, list[CodecEntry]] = {}
    for entry in codecs:
        check_integer(entry.start, f"start of codec range {entry.range.full_name!r}", least=0)
        books.setdefault(entry.range.name, []).append(entry)
    for name, entries in books.items():
        entries.sort(key=lambda c: c.start)
        numbers = [c.range.codebook for c in entries]
        if numbers != list(range(len(numbers))):
            raise TokenSpaceError(
                f"codebooks of codec {name!r} lie in the order {numbers}; expected"
                f" {list(range(len(numbers)))}: each once, none missing, none swapped"
            )
        live = [c.range.codebook for c in entries if not c.removed]
        if live != list(range(len(live))):
            raise TokenSpaceError(
                f"codec {name!r} keeps the codebooks {live} and lost earlier ones; a codec may"
                " only drop its last codebooks"
            )


def _check_tiling(
    text: TextBase | None, specials: Sequence[Special], codecs: Sequence[CodecEntry]
) -> None:
    places = [] if text is None else [(0, text.size, f"text base {text.name!r}")]
    places += [(s.id, 1, f"special token {s.key!r}") for s in specials if not s.alias]
    places += [(c.start, c.range.size, f"codec range {c.range.full_name!r}") for c in codecs]
    end, last = 0, "the start"
    for start, size, what in sorted(places):
        if start < end:
            raise TokenSpaceError(
                f"{what} starts at {start} and overlaps {last}, which ends at {end - 1}"
            )
        if start > end:
            raise TokenSpaceError(
                f"ids {end} to {start - 1}, between {last} and {what}, belong to nothing;"
                " what was removed must stay as a named hole"
            )
        end, last = start + size, what
