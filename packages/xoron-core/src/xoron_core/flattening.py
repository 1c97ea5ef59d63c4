"""How a codec's codes lie in a sequence: frames x codebooks to one row of ids, and back.

A codec declares for each codebook how many steps it lags behind the first (`CodecRange.delay`); the
token space carries it and its hash covers it. Step s of a span holds, in the order of codebooks,
frame s - delay of each. With all delays 0 that is interleaving, frame by frame; with 0, 1, 2, ...
the delay pattern of MusicGen (Copet et al. 2023).

Where a codebook has no frame, nothing stands: a sequence holds one id per position, so no padding
code is needed, and T frames take exactly T * Q ids under every pattern. T is known at the first
step without an id of codebook 0; until then a span is *open*.

Footgun: what may follow depends on the delays. With delays 0, 1 a span of any length may go on with
codebook 0, or with codebook 1, which closes it; only then may it end.

Shapes: M items, T frames of an item, Q codebooks, n ids of a span's body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xoron_core.errors import SequenceError, TokenSpaceError
from xoron_core.tokens.space import TokenSpace
from xoron_core.values import Codes

Limits = tuple[int, int | None]
ANY_LENGTH: Limits = (1, None)


class Follow(NamedTuple):
    """What may stand at a place of a span's body: ids of these codebooks, or its end marker."""

    codebooks: tuple[int, ...]
    end: bool


class CodeLayout:
    """The places of a codec's codes in the spans that carry them.

    Args:
        space: the token space.
        names: its ranges of the codec, in codebook order.

    Attributes:
        ranges: Q ranges of ids.
        delays: Q numbers of steps; the first is 0.

    Raises:
        TokenSpaceError: if the space has no such codec range.
    """

    def __init__(self, space: TokenSpace, names: Sequence[str]) -> None:
        live = {entry.range.full_name: entry.range for entry in space.codecs if not entry.removed}
        if missing := [name for name in names if name not in live]:
            raise TokenSpaceError(
                f"no codec range {', '.join(missing)} in this token space; it has:"
                f" {', '.join(live) or 'none'}"
            )
        self.space = space
        self.ranges = tuple(space.range(name) for name in names)
        self.delays = tuple(live[name].delay for name in names)
        longest = max(self.delays)
        # Codebooks of the steps before every codebook has begun; after them each step has all Q.
        self._ramp = [q for s in range(longest) for q, d in enumerate(self.delays) if d <= s]

    @property
    def num_codebooks(self) -> int:
        """Q."""
        return len(self.ranges)

    # where things stand

    def order(self, frames: int) -> Tensor:
        """(T * Q,) int64: which code stands at each place, as frame * Q + codebook."""
        steps = torch.arange(frames)[:, None] + torch.tensor(self.delays)
        books = torch.arange(self.num_codebooks)
        return (steps * self.num_codebooks + books).flatten().argsort()

    def codebook(self, position: int, frames: int | None = None) -> int | None:
        """The codebook at a place of a span's body.

        Args:
            position: counted from the first code.
            frames: T, or None for a span that is still open.

        Returns:
            0 .. Q - 1, or None where the body is over.
        """
        if frames is None or position < self.ids_before(frames):
            ramp = len(self._ramp)
            if position < ramp:
                return self._ramp[position]
            return (position - ramp) % self.num_codebooks
        steps = range(frames, frames + max(self.delays))
        tail = [q for s in steps for q, d in enumerate(self.delays) if d <= s < frames + d]
        place = position - self.ids_before(frames)
        return tail[place] if place < len(tail) else None

    def ids_before(self, step: int) -> int:
        """How many ids an open span holds before a step."""
        return sum(max(0, step - delay) for delay in self.delays)

    def frames_before(self, position: int) -> int:
        """How many ids of codebook 0 an open span holds before a place."""
        ramp = len(self._ramp)
        if position <= ramp:
            return self._ramp[:position].count(0)
        return max(self.delays) - (ramp - position) // self.num_codebooks

    def follow(
        self, position: int, frames: int | None = None, *, limits: Limits = ANY_LENGTH
    ) -> Follow:
        """What may stand at a place of a span's body behind a legal beginning.

        Args:
            position: ids before it.
            frames: T of a span that is closed, or None.
            limits: the fewest and the most frames, None for any number.
        """
        if frames is not None:
            book = self.codebook(position, frames)
            return Follow((), True) if book is None else Follow((book,), False)
        book = self.codebook(position)
        assert book is not None
        so_far = self.frames_before(position)
        least, most = limits
        if book != 0 or so_far < least:
            return Follow((book,), False)
        more = () if most is not None and so_far >= most else (0,)
        last = self.codebook(position, so_far)
        return Follow(more if last is None else (*more, last), last is None)

    def frames_after(self, position: int, frames: int | None, *, token: int) -> int | None:
        """T of a span, or None while it is open, after a legal id at a place of its body."""
        first = self.ranges[0]
        if frames is not None or self.codebook(position) != 0 or first.start <= token < first.stop:
            return frames
        return self.frames_before(position)

    # ids and codes

    def flatten(self, codes: Codes) -> Tensor:
        """Valid codes as ids of the space, item after item: (sum of T * Q,) int64.

        Raises:
            TokenSpaceError: for a code outside its codebook.
        """
        ids = torch.stack(
            [self.space.to_global(r.name, codes.ids[..., q][codes.mask])
             for q, r in enumerate(self.ranges)],
            dim=-1,
        )  # fmt: skip
        item = codes.mask.nonzero()[:, 0]
        frame = (codes.mask.cumsum(-1) - 1)[codes.mask]
        steps = frame[:, None] + torch.tensor(self.delays, device=ids.device)
        longest = codes.mask.shape[-1] + max(self.delays)
        books = torch.arange(self.num_codebooks, device=ids.device)
        key = (item[:, None] * longest + steps) * self.num_codebooks + books
        return ids.flatten()[key.flatten().argsort()]

    def unflatten(self, ids: Tensor) -> Tensor:
        """A whole body (n,) to its codes (T, Q), local to each codebook.

        Raises:
            SequenceError: with the first place that is wrong and what was expected there.
        """
        stop, follow = self.read(ids)
        if stop < len(ids) or not follow.end:
            got = f"id {int(ids[stop])}" if stop < len(ids) else "its end"
            where = f"place {stop} of a span of {self.name}"
            raise SequenceError(f"{where}: expected {self.describe(follow)}, got {got}")
        frames = len(ids) // self.num_codebooks
        order = self.order(frames).to(ids.device)
        starts = torch.tensor([r.start for r in self.ranges], device=ids.device)
        codes = torch.empty_like(ids)
        codes[order] = ids - starts[order % self.num_codebooks]
        return codes.view(frames, self.num_codebooks)

    def read(self, ids: Tensor, *, limits: Limits = ANY_LENGTH) -> tuple[int, Follow]:
        """How far (n,) ids are the body of a span, and what may follow there.

        They are a whole body if that is n and the end may follow.
        """
        books = self._books(ids)
        ramp = torch.tensor(self._ramp, dtype=torch.int64, device=ids.device)
        regular = torch.arange(max(0, len(ids) - len(ramp)), device=ids.device)
        stop = _same(books, torch.cat([ramp, regular % self.num_codebooks])[: len(ids)])
        if limits[1] is not None:
            stop = min(stop, self.ids_before(limits[1]))
        follow = self.follow(stop, limits=limits)
        if stop == len(ids) or int(books[stop]) not in follow.codebooks:
            return stop, follow
        # Here codebook 0 ends, and with it T is known.
        frames = self.frames_before(stop)
        stop = _same(books, self.order(frames).to(ids.device) % self.num_codebooks)
        return stop, self.follow(stop, frames)

    @property
    def name(self) -> str:
        """The codec's name in the space."""
        return self.ranges[0].name.rpartition(":")[0]

    def describe(self, follow: Follow, end: str = "its end") -> str:
        """What may follow, in words."""
        words = [f"an id of {self.ranges[q].name}" for q in follow.codebooks]
        return " or ".join([*words, *([end] if follow.end else [])])

    def _books(self, ids: Tensor) -> Tensor:
        """(n,) the codebook of each id, -1 for an id of anything else."""
        books = torch.full_like(ids, -1)
        for q, r in enumerate(self.ranges):
            books[(ids >= r.start) & (ids < r.stop)] = q
        return books


def _same(first: Tensor, second: Tensor) -> int:
    """How many leading elements of two rows agree."""
    shared = min(len(first), len(second))
    wrong = (first[:shared] != second[:shared]).nonzero()
    return int(wrong[0]) if len(wrong) else shared
