"""What differs between two token spaces, by name. Imports no torch.

Ids alone say nothing: two spaces of the same size may mean different things by every one. Entries
are compared under the names they carry through all versions: the text base's, a special token's
`distribution/group/name`, a codec range's `distribution/codec:codebook`. Holes count as absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xoron_core.tokens.space import TokenSpace


@dataclass(frozen=True)
class Entry:
    """What a space says under one name.

    Attributes:
        start, size: its ids.
        meaning: what makes two entries of that name the same, ids left out.
    """

    start: int
    size: int
    meaning: dict[str, object]

    def __str__(self) -> str:
        last = self.start + self.size - 1
        return str(self.start) if self.size == 1 else f"{self.start} .. {last}"


@dataclass(frozen=True)
class Change:
    """One name under which two spaces differ.

    Attributes:
        what: `added` and `removed` are as seen from the first space; `moved` means the same at
            other ids; `changed` means something else.
        name: of the entry.
        detail: ids, or each changed property with its old and its new value.
    """

    what: Literal["added", "removed", "moved", "changed"]
    name: str
    detail: str


def entries(space: TokenSpace) -> dict[str, Entry]:
    """Everything alive in a space, by name and in the order of its ids."""
    found: dict[str, Entry] = {}
    if (text := space.text) is not None:
        meaning = {
            "size": text.size,
            "identity": text.identity,
            "normalization": text.normalization,
            "its own special tokens": text.owned,
        }
        found[text.name] = Entry(0, text.size, meaning)
    for special in space:
        found[special.key] = Entry(special.id, 1, {"string": special.string})
    for codec in space.codecs:
        if not codec.removed:
            asked = codec.range
            names = ("size", "identity", "rate", "modality", "delay")
            meaning = {name: getattr(asked, name) for name in names}
            found[asked.full_name] = Entry(codec.start, asked.size, meaning)
    return found


def difference(first: TokenSpace, second: TokenSpace) -> list[Change]:
    """What one would have to be told to read the second space's ids with the first's meaning.

    Two spaces with the same hash have none. A hole that only one of them has shows as `removed` or
    `added`, or not at all where it stands behind everything that both have.
    """
    old, new = entries(first), entries(second)
    changes = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if before is None:
            changes.append(Change("added", name, str(after)))
        elif after is None:
            changes.append(Change("removed", name, str(before)))
        elif before.meaning != after.meaning:
            parts = [
                f"{key} {before.meaning[key]!r} -> {after.meaning[key]!r}"
                for key in before.meaning
                if before.meaning[key] != after.meaning[key]
            ]
            changes.append(Change("changed", name, "; ".join(parts)))
        elif before.start != after.start:
            changes.append(Change("moved", name, f"{before} -> {after}"))
    return changes
