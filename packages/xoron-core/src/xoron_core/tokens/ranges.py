"""The entries of a token space: the text base, special tokens and codec ranges, as plain data.

Each entry checks itself when it is made; how entries lie beside each other is checked by
`TokenSpace.verify`. Nothing here imports torch, transformers or pydantic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from xoron_core.errors import TokenSpaceError

# `#` and `:` are left to derived names: the second stretch of a group, a codebook of a codec.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: Any, what: str) -> None:
    """Refuses what is not `distribution/name`.

    Raises:
        TokenSpaceError: naming the wrong name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TokenSpaceError(
            f"{what} is named {name!r}; expected 'distribution/name', e.g. 'xoron-core/control'"
        )


def check_integer(value: Any, what: str, *, least: int) -> None:
    """Refuses what is not an integer of at least `least`; True is no integer.

    Raises:
        TokenSpaceError: with the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TokenSpaceError(f"{what} must be an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class TextBase:
    """The opaque range 0 .. size - 1 that a base tokenizer defines.

    Attributes:
        name: `distribution/name`, e.g. `xoron-llm/byte`.
        size: number of ids, at least 1.
        identity: a hash of the base vocabulary.
        owned: special strings that the base already holds, with their ids. A group that asks for
            one of them gets an alias, never a second id.
        normalization: what the base does to text before it encodes (`NFC`), or None.
    """

    name: str
    size: int
    identity: str
    owned: Mapping[str, int] = field(default_factory=dict)
    normalization: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "the text base")
        check_integer(self.size, f"size of text base {self.name!r}", least=1)
        if not isinstance(self.identity, str) or not self.identity:
            raise TokenSpaceError(f"text base {self.name!r} needs an identity: a vocabulary hash")
        seen: dict[int, str] = {}
        for string, number in self.owned.items():
            check_integer(number, f"id of {string!r} in text base {self.name!r}", least=0)
            if number >= self.size:
                raise TokenSpaceError(
                    f"text base {self.name!r} has {self.size} ids but owns {string!r} at {number}"
                )
            if number in seen:
                raise TokenSpaceError(
                    f"text base {self.name!r} owns {seen[number]!r} and {string!r} at id {number};"
                    " one id has one string"
                )
            seen[number] = string
        object.__setattr__(self, "owned", dict(self.owned))


@dataclass(frozen=True)
class CodecRange:
    """What a codec requests for one of its codebooks.

    Attributes:
        name: `distribution/codec`, e.g. `xoron-toy/signal-codec`.
        codebook: 0-based index of the codebook.
        size: number of codes, at least 1.
        identity: a hash of what its codes mean (architecture, weights, preprocessing).
        rate: codes per second or per item, whatever the codec counts in; None if it varies.
        modality: the modality it decodes to.
        delay: how many steps its codes stand behind those of codebook 0 in a sequence; all 0 is
            interleaving, 0, 1, 2, ... the delay pattern (see `xoron_core.flattening`).
    """

    name: str
    codebook: int
    size: int
    identity: str
    rate: float | None
    modality: str
    delay: int = 0

    def __post_init__(self) -> None:
        check_name(self.name, "a codec range")
        check_integer(self.codebook, f"codebook of codec {self.name!r}", least=0)
        check_integer(self.size, f"size of codec range {self.full_name!r}", least=1)
        if not isinstance(self.identity, str) or not self.identity:
            raise TokenSpaceError(f"codec range {self.full_name!r} needs an identity")
        if not isinstance(self.modality, str) or not self.modality:
            raise TokenSpaceError(f"codec range {self.full_name!r} needs a modality")
        check_integer(self.delay, f"delay of codec range {self.full_name!r}", least=0)
        if self.codebook == 0 and self.delay:
            raise TokenSpaceError(
                f"codec range {self.full_name!r} has a delay of {self.delay}; delays count from"
                " codebook 0, whose own is 0"
            )
        if self.rate is not None:
            rate = self.rate
            if not isinstance(rate, int | float) or isinstance(rate, bool):
                raise TokenSpaceError(f"rate of {self.full_name!r} is {rate!r}, not a number")
            if not math.isfinite(rate) or rate <= 0:
                raise TokenSpaceError(f"rate of {self.full_name!r} must be > 0, got {rate}")
            object.__setattr__(self, "rate", float(rate))  # 25 and 25.0 mean the same

    @property
    def full_name(self) -> str:
        """`name:codebook`, the name of the range."""
        return f"{self.name}:{self.codebook}"


@dataclass(frozen=True)
class Special:
    """One special token of a space.

    Attributes:
        group: `distribution/group` it belongs to.
        name: its name in the group.
        string: how it is written.
        id: its id; inside the text base for an alias.
        hidden: whether what it opens is internal and stripped from shown text.
        alias: whether the text base owns the string.
        removed: whether it is a named hole: the row stays, nothing means it.
    """

    group: str
    name: str
    string: str
    id: int
    hidden: bool = False
    alias: bool = False
    removed: bool = False

    @property
    def key(self) -> str:
        """`distribution/group/name`."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class CodecEntry:
    """A codec range with its place.

    Attributes:
        range: what the codec asked for.
        start: first id.
        removed: whether it is a named hole.
    """

    range: CodecRange
    start: int
    removed: bool = False


@dataclass(frozen=True)
class Range:
    """A named stretch of ids `start .. start + size - 1`, for looking things up.

    Attributes:
        name: of the text base, of a group (`group#2` is its second stretch, appended later), or
            `codec:codebook`.
        kind: what it holds.
        start, size: in ids.
        removed: whether all of it is a named hole.
    """

    name: str
    kind: Literal["text", "special", "codec"]
    start: int
    size: int
    removed: bool = False

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size


def special_ranges(specials: Sequence[Special]) -> list[Range]:
    """Returns one range for each run of consecutive ids of a group; aliases have none.

    Holes inside a run stay part of it, so that local ids do not move when a token is removed.
    """
    runs: list[list[Special]] = []
    for special in specials:
        if special.alias:
            continue
        last = runs[-1][-1] if runs else None
        if last and (last.group, last.id + 1) == (special.group, special.id):
            runs[-1].append(special)
        else:
            runs.append([special])
    found: list[Range] = []
    count: dict[str, int] = {}
    for run in runs:
        group = run[0].group
        count[group] = count.get(group, 0) + 1
        name = group if count[group] == 1 else f"{group}#{count[group]}"
        found.append(Range(name, "special", run[0].id, len(run), all(s.removed for s in run)))
    return found
