"""Lays out a token space: the canonical first allocation, and the append-only one under a lock.

Footgun: a lock keeps what an id means, so a contribution that now means something else under an
old name is refused, not renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import TokenSpaceError
from xoron_core.tokens.ranges import CodecEntry, CodecRange, Special, TextBase, check_name
from xoron_core.tokens.special_tokens import core_order

if TYPE_CHECKING:
    from xoron_core.tokens.space import TokenSpace


def allocate_entries(
    text: TextBase | None,
    groups: Sequence[TokenGroup],
    *,
    codecs: Sequence[CodecRange],
    lock: TokenSpace | None,
) -> tuple[tuple[Special, ...], tuple[CodecEntry, ...]]:
    """Returns the special tokens and codec ranges of a new space; see `TokenSpace.allocate`."""
    _check_names(groups, codecs)
    if lock is not None:
        _check_text(text, lock.text)
    end = text.size if text is not None else 0
    if lock is not None:
        end = lock.size
    specials, end = _place_specials(text, groups, lock=lock, end=end)
    return specials, _place_codecs(codecs, lock=lock, end=end)


def _check_names(groups: Sequence[TokenGroup], codecs: Sequence[CodecRange]) -> None:
    names: set[str] = set()
    for group in groups:
        check_name(group.name, "a group of special tokens")
        if group.name in names:
            raise TokenSpaceError(f"group {group.name!r} is contributed twice; keep one")
        names.add(group.name)
    for codec in codecs:
        if codec.full_name in names:
            raise TokenSpaceError(f"codec range {codec.full_name!r} is requested twice; keep one")
        names.add(codec.full_name)


def _check_text(text: TextBase | None, old: TextBase | None) -> None:
    if text == old:
        return
    if text is None or old is None:
        had, has = (f"{t.name!r}" if t else "no text base" for t in (old, text))
        raise TokenSpaceError(
            f"the locked token space has {had}, the composition has {has}; under a lock the text"
            " base stays. Compose without the lock, or keep the tokenizer."
        )
    changed = [
        f"{name} was {getattr(old, name)!r} and is {getattr(text, name)!r}"
        for name in ("name", "size", "identity", "normalization")
        if getattr(old, name) != getattr(text, name)
    ]
    if old.owned != text.owned:
        gone = sorted(old.owned.items() - text.owned.items())
        came = sorted(text.owned.items() - old.owned.items())
        changed.append(f"its own specials lost {gone} and gained {came}")
    raise TokenSpaceError(
        f"text base {old.name!r} differs from the locked token space: {'; '.join(changed)}."
        " Every id would change its meaning: use the tokenizer the lock was made with."
    )


def _place_specials(
    text: TextBase | None, groups: Sequence[TokenGroup], *, lock: TokenSpace | None, end: int
) -> tuple[tuple[Special, ...], int]:
    old = {s.key: s for s in lock.specials} if lock is not None else {}
    owned = text.owned if text is not None else {}
    placed: list[Special] = []
    seen: set[str] = set()
    for group in sorted(groups, key=lambda g: core_order(g.name)):
        for name, string in group.tokens.items():
            hidden = name in group.hidden
            alias = string in owned
            fresh = Special(
                group.name, name, string, owned.get(string, end), hidden=hidden, alias=alias
            )
            seen.add(fresh.key)
            if (before := old.get(fresh.key)) is not None:
                if before.string != string:
                    raise TokenSpaceError(
                        f"special token {fresh.key!r} was {before.string!r} in the locked token"
                        f" space and is {string!r} now; give the new string a new name"
                    )
                fresh = replace(before, removed=False, hidden=hidden)
            elif not alias:
                end += 1
            placed.append(fresh)
    # An alias has no row of its own, so it leaves no hole behind.
    placed += [replace(s, removed=True) for s in old.values() if s.key not in seen and not s.alias]
    return tuple(placed), end


def _place_codecs(
    codecs: Sequence[CodecRange], *, lock: TokenSpace | None, end: int
) -> tuple[CodecEntry, ...]:
    old = {c.range.full_name: c for c in lock.codecs} if lock is not None else {}
    placed: list[CodecEntry] = []
    seen: set[str] = set()
    for codec in sorted(codecs, key=lambda c: (c.name, c.codebook)):
        seen.add(codec.full_name)
        before = old.get(codec.full_name)
        if before is None:
            placed.append(CodecEntry(codec, end))
            end += codec.size
        elif before.range == codec:
            placed.append(replace(before, removed=False))
        else:
            raise TokenSpaceError(_changed_codec(before.range, codec, list(old.values())))
    placed += [replace(c, removed=True) for name, c in old.items() if name not in seen]
    return tuple(placed)


def _changed_codec(before: CodecRange, now: CodecRange, old: list[CodecEntry]) -> str:
    changed = [
        f"{name} was {getattr(before, name)!r} and is {getattr(now, name)!r}"
        for name in ("size", "identity", "rate", "modality", "delay")
        if getattr(before, name) != getattr(now, name)
    ]
    message = (
        f"codec range {now.full_name!r} differs from the locked token space: {'; '.join(changed)}."
    )
    for other in old:
        if other.range == replace(now, codebook=other.range.codebook, delay=other.range.delay):
            return (
                f"{message} It equals {other.range.full_name!r}: the codebooks are swapped;"
                " restore their order."
            )
    return f"{message} Use the codec the lock was made with, or give the new one a new name."
