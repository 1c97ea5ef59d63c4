"""Who gets whose media: a derangement between samples that show and expect something else.

A medium goes to another sample only if that makes a difference that a model which sees could tell:

- Samples that share a medium, or share one with a third sample, form a group, and a medium never
  stays within its group: nobody is shown her own media, under whatever name they are stored.
- It never goes to a sample that expects the same words. Of questions with four answers every fourth
  would else be asked about another image with the same answer, which a model that sees answers as
  well as before.
- It goes only where as many positions stand as it takes, so that sequences stay as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

_T = TypeVar("_T")


class Medium(NamedTuple):
    """A medium as shuffling sees it.

    Attributes:
        slot: of the encoder that reads it.
        length: positions it takes in the sequence.
        content: a digest of what the encoder is given.
    """

    slot: str
    length: int
    content: str


class Place(NamedTuple):
    """The medium number `medium` of a sample."""

    sample: int
    medium: int


def groups(samples: Sequence[Sequence[Medium]]) -> list[int]:
    """The group of each sample, named by one of its members."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, media in enumerate(samples):
        for medium in media:
            parent[root(index)] = root(first.setdefault((medium.slot, medium.content), index))
    return [root(index) for index in range(len(samples))]


def donors(
    samples: Sequence[Sequence[Medium]],
    *,
    group: Sequence[int],
    expected: Sequence[Hashable],
    seed: int,
) -> list[list[Place] | None]:
    """For each sample the places that its media are taken from.

    Every medium is given at most once, so that shuffled samples are shown what samples show. Media
    of one slot and length are put in a row, groups side by side and, as far as that goes, those
    side by side that expect the same; then they are handed on by the length of the longest such
    stretch. Where each group expects one thing, no other way leaves fewer of them behind.

    Args:
        samples: the media of each.
        group: of each sample, as `groups` gives it.
        expected: of each sample, equal where the same is expected.
        seed: of the row.

    Returns:
        Per sample a place for each of its media, or None if one of them found no other.
    """
    rng = np.random.default_rng(seed)
    alike: dict[tuple[str, int], list[Place]] = {}
    for index, media in enumerate(samples):
        for number, medium in enumerate(media):
            alike.setdefault((medium.slot, medium.length), []).append(Place(index, number))
    taken: dict[Place, Place] = {}
    for _, places in sorted(alike.items()):
        row, shift = _row(_permuted(places, rng), group, expected)
        for place, donor in zip(row, row[shift:] + row[:shift], strict=True):
            one, other = place.sample, donor.sample
            if group[one] != group[other] and expected[one] != expected[other]:
                taken[place] = donor
    found = []
    for index, media in enumerate(samples):
        wanted = [Place(index, number) for number in range(len(media))]
        whole = all(place in taken for place in wanted)
        found.append([taken[place] for place in wanted] if whole else None)
    return found


def _row(
    places: Sequence[Place], group: Sequence[int], expected: Sequence[Hashable]
) -> tuple[list[Place], int]:
    """Places in a row, like beside like, and how far to hand them on."""
    blocks: dict[int, list[Place]] = {}
    for place in places:
        blocks.setdefault(group[place.sample], []).append(place)
    stretches: dict[Hashable, list[Place]] = {}
    for block in blocks.values():
        stretches.setdefault(expected[block[0].sample], []).extend(block)
    row = [place for stretch in stretches.values() for place in stretch]
    largest = max(len(block) for block in blocks.values())
    longest = max(len(stretch) for stretch in stretches.values())
    # Between these bounds nothing stays within its group.
    fits = largest <= longest <= len(row) - largest
    return row, (longest if fits else largest) % len(row)


def _permuted(items: list[_T], rng: np.random.Generator) -> list[_T]:
    return [items[index] for index in rng.permutation(len(items))]
