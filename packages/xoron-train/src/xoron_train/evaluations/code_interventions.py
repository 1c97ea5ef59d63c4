"""What is done to media that enter as ids of a codec, as `interventions` does to features.

- `shuffled`: the codes of the medium of a sample that expects something else;
- `zeroed`: every code is 0, so that all media are one;
- `noised`: codes drawn as often as they stand, codebook by codebook, in the media of all samples.

The number of codes stays, and with it the sequence.

Footguns:
- `encode` is an entry method and no module call, so torch's hooks do not see it. It is shadowed on
  the codec's instance and uncovered again whatever happens.
- One codec may read and make media. What the assistant makes is the target and never changed.

Shapes: M items of one call, P of them changed, T steps of the longest, Q codebooks, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from xoron_core.components import Codec, Codes

Change = Callable[[Codes], Codes]
Draw = Callable[[int, int], Tensor]


class CodeCounts:
    """How often each code of each codebook stands in the media of a slot, counted on the CPU."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    def add(self, codes: Codes) -> Codes:
        """Adds the valid codes of one call, and returns them as they are."""
        values = codes.ids[codes.mask].cpu()
        for book, column in enumerate(values.unbind(-1)):
            found = torch.bincount(column)
            if book == len(self.counts):
                self.counts.append(found)
                continue
            size = max(len(found), len(self.counts[book]))
            total = torch.zeros(size, dtype=torch.int64)
            for part in (found, self.counts[book]):
                total[: len(part)] += part
            self.counts[book] = total
        return codes

    def draw(self, length: int, seed: int) -> Tensor:
        """(length, Q) codes with these frequencies, int64, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        columns = [
            torch.multinomial(counts.double(), length, replacement=True, generator=generator)
            for counts in self.counts
        ]
        return torch.stack(columns, dim=-1)


@contextmanager
def shadowed(codec: Codec, change: Change) -> Iterator[None]:
    """Lets `change` have what the codec's `encode` returns, and returns its own instead."""
    encode = codec.encode
    codec.encode = lambda **media: change(encode(**media))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del codec.encode


def exchanged(codes: Codes, changed: Sequence[bool], given: Codes) -> Codes:
    """The codes with those of other media in the rows that are changed.

    Args:
        codes: ids (M, T, Q).
        changed: of each item, whether it is.
        given: ids (P, T', Q), as many steps in each as in the row it goes to.
    """
    rows = iter(range(len(given.ids)))
    return rewritten(codes, changed, lambda _index, _steps: _valid(given, next(rows)))


def rewritten(codes: Codes, changed: Sequence[bool], new: Draw) -> Codes:
    """The codes with new ones in the rows that are changed.

    Args:
        codes: ids (M, T, Q).
        changed: of each item, whether it is.
        new: number among the changed items and n to (n, Q) codes.
    """
    ids = codes.ids.clone()
    chosen = [row for row, is_changed in enumerate(changed) if is_changed]
    for index, row in enumerate(chosen):
        mask = codes.mask[row]
        ids[row, mask] = new(index, int(mask.sum())).to(ids)
    return codes._replace(ids=ids)


def _valid(codes: Codes, row: int) -> Tensor:
    return codes.ids[row, codes.mask[row]]
