"""The token space: the one map from integer ids to meaning, an ABI between checkpoints.

What it does
- lays out ids canonically: the text base at 0, special tokens by group, codec ranges;
- extends append-only under a lock, where what is gone stays as a *named hole*;
- answers lookups, maps ids to (range, local id) and back on tensors, makes row masks;
- hashes its meaning and is written as `token_space.json`.

Footguns
- Row counts come from `size` (holes included), never from `len(tokenizer)`.
- Only what a composition names may be passed to `allocate`, never what happens to be installed.
- An alias is an id of the text base: it is no new row.
- `hidden` marks are carried in the file but are not part of the hash: they say what is shown, not
  what an id means.

This module imports no torch; tensor methods import it when called. Shapes: any shape is written
(...); R is `size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import TokenSpaceError, did_you_mean
from xoron_core.tokens import serial
from xoron_core.tokens.allocation import allocate_entries
from xoron_core.tokens.checks import verify_entries
from xoron_core.tokens.ranges import (
    CodecEntry,
    CodecRange,
    Range,
    Special,
    TextBase,
    special_ranges,
)
from xoron_core.tokens.special_tokens import ALIASES, hidden_markers, pairs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CodecEntry",
    "CodecRange",
    "Range",
    "Special",
    "TextBase",
    "TokenSpace",
    "FILE_NAME",
]

FILE_NAME = "token_space.json"


@dataclass(frozen=True, repr=False)
class TokenSpace:
    """An immutable, verified token space. Make one with `allocate`, `load` or `from_json`.

    Attributes:
        text: the text base, or None (a model of codecs alone).
        specials: special tokens by ascending id, aliases and holes included.
        codecs: codec ranges by ascending start, holes included.
    """

    text: TextBase | None
    specials: tuple[Special, ...] = ()
    codecs: tuple[CodecEntry, ...] = ()

    def __post_init__(self) -> None:
        specials = tuple(sorted(self.specials, key=lambda s: (s.id, s.group, s.name)))
        codecs = tuple(sorted(self.codecs, key=lambda c: (c.start, c.range.full_name)))
        object.__setattr__(self, "specials", specials)
        object.__setattr__(self, "codecs", codecs)
        self.verify()

    def __repr__(self) -> str:
        base = f"{self.text.name!r}, " if self.text is not None else ""
        return f"TokenSpace({base}{self.size} rows, {self.hash[:15]}...)"

    @classmethod
    def allocate(
        cls,
        *,
        text: TextBase | None,
        groups: Sequence[TokenGroup],
        codecs: Sequence[CodecRange] = (),
        lock: TokenSpace | None = None,
    ) -> TokenSpace:
        """Lays out ids for exactly these contributions; the order they come in does not matter.

        Args:
            text: the text base.
            groups: the selected groups of special tokens.
            codecs: the ranges that the composition's codecs request.
            lock: an earlier space. Nothing of it moves; what is new is appended; what is no
                longer passed stays as a named hole, and comes back at its old ids when it is
                passed again with the same meaning.

        Raises:
            TokenSpaceError: on duplicate names or strings, or where a contribution contradicts
                the lock.
        """
        specials, entries = allocate_entries(text, groups, codecs=codecs, lock=lock)
        return cls(text, specials, entries)

    def verify(self) -> None:
        """Checks the structure; a space that exists has passed it.

        Raises:
            TokenSpaceError: naming what overlaps, what a gap lies between, duplicate strings or
                names, codebooks out of order.
        """
        verify_entries(self.text, self.specials, self.codecs)

    @property
    def text_size(self) -> int:
        """Number of ids of the text base."""
        return self.text.size if self.text is not None else 0

    @cached_property
    def size(self) -> int:
        """R: number of rows of embedding and head, holes included."""
        return max((r.stop for r in self.ranges), default=0)

    @cached_property
    def hash(self) -> str:
        """`sha256:...` over the meaning of every id, and over nothing else."""
        return serial.meaning_hash(self)

    def require_same(self, other_hash: str, *, where: str) -> None:
        """Refuses data or weights that were made with another space.

        Raises:
            TokenSpaceError: naming both hashes and `where`.
        """
        if other_hash != self.hash:
            raise TokenSpaceError(
                f"{where}: made with token space {other_hash}, but this model has {self.hash}."
                f" The same ids mean different things: use the model that {where} was made for,"
                " or make it again with this model."
            )

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """Every stretch of ids in ascending order; together they tile 0 .. R - 1."""
        found = [] if self.text is None else [Range(self.text.name, "text", 0, self.text.size)]
        found += special_ranges(self.specials)
        found += [
            Range(c.range.full_name, "codec", c.start, c.range.size, c.removed) for c in self.codecs
        ]
        return tuple(sorted(found, key=lambda r: r.start))

    def range(self, name: str) -> Range:
        """Returns the range of that name.

        Raises:
            TokenSpaceError: if there is none.
        """
        for found in self.ranges:
            if found.name == name:
                return found
        names = [r.name for r in self.ranges]
        raise TokenSpaceError(
            f"no range {name!r} in this token space.{did_you_mean(name, names)}"
            f" It has: {', '.join(names)}."
        )

    def codebooks(self, codec: str) -> tuple[Range, ...]:
        """Returns the live ranges of a codec by ascending codebook.

        Raises:
            TokenSpaceError: if the space has no live range of that codec.
        """
        live = [c for c in self.codecs if c.range.name == codec and not c.removed]
        if not live:
            names = sorted({c.range.name for c in self.codecs if not c.removed})
            raise TokenSpaceError(
                f"no codec {codec!r} in this token space.{did_you_mean(codec, names)}"
                f" It has: {', '.join(names) or 'none'}."
            )
        return tuple(self.range(c.range.full_name) for c in live)

    def __iter__(self) -> Iterator[Special]:
        """Iterates over the live special tokens, aliases included, by ascending id."""
        return (s for s in self.specials if not s.removed)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """String to id of every live special token, aliases included."""
        return {string: special.id for string, special in self._by_string.items()}

    @cached_property
    def _by_string(self) -> dict[str, Special]:
        return {s.string: s for s in self}

    @cached_property
    def tokens(self) -> dict[str, str]:
        """Name to string of every live special token.

        A name that two groups use stands for the one of xoron-core, if it is one of the two; the
        others stand under `distribution/group/name`.
        """
        return {name: found.string for name, found in self._by_name.items()}

    @cached_property
    def _by_name(self) -> dict[str, Special]:
        found: dict[str, list[Special]] = {}
        for special in self:
            found.setdefault(special.name, []).append(special)
        result: dict[str, Special] = {}
        for name, candidates in found.items():
            core = [s for s in candidates if s.group.startswith("xoron-core/")]
            chosen = candidates if len(candidates) == 1 else core if len(core) == 1 else []
            if chosen:
                result[name] = chosen[0]
            result |= {s.key: s for s in candidates if s not in chosen}
        return result

    def groups(self) -> dict[str, tuple[Special, ...]]:
        """Returns the live special tokens by group."""
        found: dict[str, list[Special]] = {}
        for special in self:
            found.setdefault(special.group, []).append(special)
        return {group: tuple(members) for group, members in found.items()}

    def find(self, word: str) -> Special | None:
        """Returns the live special token with that string, name, key or alias, or None."""
        for candidate in (word, ALIASES.get(word, word)):
            if found := self._by_string.get(candidate) or self._by_name.get(candidate):
                return found
        return next((s for s in self if s.key == word), None)

    def id_of(self, word: str) -> int:
        """Returns the id of a special token.

        Args:
            word: its string, its name, or `distribution/group/name`.

        Raises:
            TokenSpaceError: if the space has no such token, or several of that name.
        """
        if (found := self.find(word)) is not None:
            return found.id
        same = [s.key for s in self if s.name == word]
        if same:
            raise TokenSpaceError(f"several special tokens are named {word!r}: {', '.join(same)}")
        hint = did_you_mean(word, [*self.special_ids, *self.tokens])
        raise TokenSpaceError(
            f"no special token {word!r} in this token space.{hint}"
            " Select its group in the composition (tokens.groups)."
        )

    def pairs(self) -> dict[str, str]:
        """Returns begin string to end string of every live pair."""
        found: dict[str, str] = {}
        for members in self.groups().values():
            found |= pairs({s.name: s.string for s in members})
        return found

    @cached_property
    def hidden(self) -> dict[str, str | None]:
        """Hidden strings, begins with their ends, for `strip_hidden_tokens(..., hidden=)`."""
        return hidden_markers(
            TokenGroup(
                name,
                {s.name: s.string for s in members},
                frozenset(s.name for s in members if s.hidden),
            )
            for name, members in self.groups().items()
        )

    def to_global(self, range_name: str, local_ids: Tensor) -> Tensor:
        """Maps ids local to a range to ids of the space.

        Args:
            range_name: e.g. `xoron-toy/signal-codec:0`.
            local_ids: (...) integers in 0 .. range size - 1.

        Returns:
            (...) int64.

        Raises:
            TokenSpaceError: with the first value outside the range and its position.
        """
        from xoron_core.tokens import rows

        return rows.to_global(self, range_name, local_ids)

    def to_local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ids of the space to (index into `ranges`, local id).

        Args:
            ids: (...) integers in 0 .. R - 1, no holes.

        Returns:
            two (...) int64 tensors.

        Raises:
            TokenSpaceError: with the first value that is no live id and its position.
        """
        from xoron_core.tokens import rows

        return rows.to_local(self, ids)

    def allowed(
        self,
        *,
        text: bool = True,
        specials: Iterable[str] = (),
        codecs: Iterable[str] = (),
        rows: int | None = None,
    ) -> Tensor:
        """Returns which rows a decoding step may choose from.

        Args:
            text: whether ids of the text base are allowed.
            specials: groups (core's also by their short name), token names or strings to allow.
            codecs: codecs (`name`, all codebooks) or codec ranges (`name:codebook`) to allow.
            rows: length of the logits, at least R; a pretrained matrix may be longer than the
                space, and what lies beyond it is never allowed. Default R.

        Returns:
            (rows,) bool. Holes are never True.

        Raises:
            TokenSpaceError: on an unknown name or too few rows.
        """
        from xoron_core.tokens import rows as row_maps

        return row_maps.allowed(self, text=text, specials=specials, codecs=codecs, rows=rows)

    def new_rows(self, base_rows: int) -> Tensor:
        """Returns the rows to draw anew over a pretrained matrix of `base_rows` rows.

        A pretrained matrix often has padding rows beyond its vocabulary; ids of ours that fall
        on them are new all the same.

        Returns:
            int64, ascending: every id at or above min(text size, base_rows).

        Raises:
            TokenSpaceError: if `base_rows` is negative.
        """
        from xoron_core.tokens import rows

        return rows.new_rows(self, base_rows)

    def to_json(self) -> str:
        """Returns the canonical text of `token_space.json`."""
        return serial.dump(self)

    @classmethod
    def from_json(cls, text: str, *, where: str = FILE_NAME) -> TokenSpace:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON text.
            where: stands for the file in errors.

        Raises:
            FolderError: if the text is no JSON (truncated).
            TokenSpaceError: if its version is unknown, a field is wrong, the structure does not
                verify, or its hash does not match its content (both hashes are named).
        """
        fields = serial.parse(text, where)
        try:
            space = cls(*serial.entries(fields, where))
        except TokenSpaceError as error:
            raise TokenSpaceError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
        serial.check_hash(fields, space, where)
        return space

    def save(self, path: str | Path) -> None:
        """Writes the space to a file, or to `token_space.json` in an existing folder."""
        serial.save(_file(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TokenSpace:
        """Reads a space from a file, or from `token_space.json` in a folder.

        Raises:
            FolderError: if the file is missing or truncated.
            TokenSpaceError: as `from_json`.
        """
        file = _file(path)
        return cls.from_json(serial.read(file), where=str(file))

    def __getstate__(self) -> dict[str, Any]:
        # Cached tensors must not travel to data workers.
        return {"text": self.text, "specials": self.specials, "codecs": self.codecs}


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
