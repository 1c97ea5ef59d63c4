"""Text and media codes to one sequence of ids, and back: the grammar of whole sequences.

    sequence = (text | span)*
    span     = begin (codes | placeholders) end

`SpanGrammar.build` writes pieces, `parse` reads them; they are inverse, except that texts which
stand side by side are read as one. A span carries the codes of one medium, in the order that the
token space declares for its codec, or placeholders, where an encoder's features or a generator's
queries stand. Everything is derived from the token space and the modalities, so neither weights nor
components are needed: shards are checked by it, and what a session generates obeys it.

Footguns
- `begin` and `gen_begin` are different markers: what a model reads and what it makes. `made` tells.
- A sequence that fills a generator's or an encoder's places is legal, but carries no media.

Shapes: n ids, T frames of an item, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xoron_core.descriptors import Modality
from xoron_core.errors import SequenceError
from xoron_core.flattening import ANY_LENGTH, CodeLayout, Limits
from xoron_core.losses import IGNORE
from xoron_core.tokens.space import TokenSpace
from xoron_core.values import Codes


@dataclass(frozen=True)
class TextPiece:
    """Ids of the text base and special tokens that mark no media."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CodedPiece:
    """A medium as codes.

    Attributes:
        codec: name of the codec in the token space.
        codes: (T, Q) int64, local to each codebook.
        made: whether it is output, not input.
    """

    codec: str
    codes: Tensor
    made: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CodedPiece):
            return NotImplemented
        same = (self.codec, self.made) == (other.codec, other.made)
        return same and torch.equal(self.codes, other.codes)


@dataclass(frozen=True)
class PlaceholderPiece:
    """Positions that features or queries of a medium fill.

    Attributes:
        modality: of the medium.
        length: how many positions.
        made: whether it is output, not input.
    """

    modality: str
    length: int
    made: bool = False


Piece = TextPiece | CodedPiece | PlaceholderPiece


@dataclass(frozen=True)
class _Span:
    """One kind of span: its markers, and what may stand between them."""

    modality: str
    made: bool
    begin: int
    end: int
    placeholder: int | None
    codecs: tuple[str, ...]


class SpanGrammar:
    """Reads and writes sequences of a token space.

    Args:
        space: the token space.
        modalities: by name, with the markers that the composition chose for them.
        limits: codec name to the fewest and the most frames of what is *made*
            (`Codec.frame_limits`); input may have any length.
    """

    def __init__(
        self,
        space: TokenSpace,
        modalities: Mapping[str, Modality],
        *,
        limits: Mapping[str, Limits] | None = None,
    ) -> None:
        self.space = space
        self.limits = dict(limits or {})
        live = [entry.range for entry in space.codecs if not entry.removed]
        self.codecs = {name: _layout(space, name) for name in dict.fromkeys(r.name for r in live)}
        self._strings = {number: string for string, number in space.special_ids.items()}
        self._spans: list[_Span] = []
        for modality in modalities.values():
            codecs = dict.fromkeys(r.name for r in live if r.modality == modality.name)
            self._spans += _spans_of(space, modality, tuple(codecs))
        self._opens = {span.begin for span in self._spans}
        closes = {span.end for span in self._spans}
        held = {span.placeholder for span in self._spans if span.placeholder is not None}
        self._marks = torch.tensor(sorted(self._opens | closes), dtype=torch.int64)
        self._text = torch.zeros(space.size, dtype=torch.bool)
        self._text[: space.text_size] = True
        self._text[[special.id for special in space]] = True
        self._text[sorted(self._opens | closes | held)] = False

    # writing

    def build(self, pieces: Iterable[Piece]) -> Tensor:
        """Pieces to (n,) ids.

        Raises:
            SequenceError: for a text that holds other ids, a medium without frames, or one that no
                span of this space carries.
            TokenSpaceError: for a code outside its codebook.
        """
        rows = [self._write(piece) for piece in pieces]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)

    def example(self, prompt: Iterable[Piece], target: Iterable[Piece]) -> tuple[Tensor, Tensor]:
        """A training example: (n,) ids and (n,) labels, -100 on the prompt.

        All of the target is learned, begin and end markers of its spans too: a model has to open a
        span before it fills it, and to say that it is over. Placeholders are no ids and never are.
        """
        first, second = self.build(prompt), self.build(target)
        held = [span.placeholder for span in self._spans if span.placeholder is not None]
        places = torch.isin(second, torch.tensor(held, dtype=torch.int64))
        learned = second.masked_fill(places, IGNORE)
        return torch.cat([first, second]), torch.cat([torch.full_like(first, IGNORE), learned])

    def _write(self, piece: Piece) -> Tensor:
        if isinstance(piece, TextPiece):
            ids = torch.tensor(piece.ids, dtype=torch.int64)
            self.space.to_local(ids)
            self._check_text(ids, 0)
            return ids
        if isinstance(piece, PlaceholderPiece):
            found = [s for s in self._spans if s.modality == piece.modality]
            span = next((s for s in found if s.made == piece.made), None)
            if span is None or span.placeholder is None or piece.length < 1:
                raise SequenceError(
                    f"{piece}: expected 1 or more positions, and markers and a placeholder of"
                    f" {piece.modality!r} in this token space"
                )
            return torch.tensor([span.begin, *[span.placeholder] * piece.length, span.end])
        direction = [s for s in self._spans if s.made == piece.made]
        span = next((s for s in direction if piece.codec in s.codecs), None)
        if span is None:
            known = sorted({codec for s in direction for codec in s.codecs})
            raise SequenceError(
                f"no {'output' if piece.made else 'input'} span carries codes of {piece.codec!r};"
                f" there are spans for: {', '.join(known) or 'none'}"
            )
        return torch.tensor([span.begin, *self._codes(piece).tolist(), span.end])

    def _codes(self, piece: CodedPiece) -> Tensor:
        layout = self.codecs[piece.codec]
        shape = tuple(piece.codes.shape)
        if len(shape) != 2 or shape[1] != layout.num_codebooks or not shape[0]:
            raise SequenceError(
                f"codes of {piece.codec!r} have the shape {shape}; expected (frames >= 1,"
                f" {layout.num_codebooks})"
            )
        least, most = self._limits(piece.codec, piece.made)
        if shape[0] < least or (most is not None and shape[0] > most):
            raise SequenceError(
                f"a made medium of {piece.codec!r} has {least} to {most} frames, got {shape[0]}"
            )
        mask = torch.ones(1, shape[0], dtype=torch.bool, device=piece.codes.device)
        return layout.flatten(Codes(piece.codes[None], mask, [{}]))

    # reading

    def parse(self, ids: Tensor) -> list[Piece]:
        """(n,) ids to pieces.

        Raises:
            SequenceError: with the first position that is wrong, what was expected there and what
                stands there.
            TokenSpaceError: for an id that the space does not have, with its position.
        """
        ids = ids.cpu()
        self.space.to_local(ids)
        pieces: list[Piece] = []
        start = 0
        opened: int | None = None
        marks = torch.isin(ids, self._marks).nonzero().flatten().tolist()
        for position in [*marks, len(ids)]:
            if opened is not None:
                pieces.append(self._read_span(ids, opened, position))
                opened = None
            else:
                self._check_text(ids[:position], start)
                if position > start:
                    pieces.append(TextPiece(tuple(ids[start:position].tolist())))
                if position < len(ids):
                    if int(ids[position]) not in self._opens:
                        raise _wrong(position, "text or a begin marker", self._name(ids, position))
                    opened = position
            start = position + 1
        return pieces

    def _read_span(self, ids: Tensor, begin: int, stop: int) -> Piece:
        """The span whose begin marker stands at `begin` and whose next marker stands at `stop`."""
        spans = [span for span in self._spans if span.begin == int(ids[begin])]
        body = ids[begin + 1 : stop]
        first = int(body[0]) if len(body) else -1
        for span in spans:
            if first == span.placeholder:
                return self._read_places(ids, begin, stop, span=span)
            for codec in span.codecs:
                if any(r.start <= first < r.stop for r in self.codecs[codec].ranges):
                    return self._read_codes(ids, begin, stop, span=span, codec=codec)
        kinds = [self.codecs[c].ranges[0].name for span in spans for c in span.codecs]
        expected = [f"an id of {kind}" for kind in kinds]
        held = [span.placeholder for span in spans if span.placeholder is not None]
        expected += [self._strings[placeholder] for placeholder in held]
        raise _wrong(begin + 1, " or ".join(dict.fromkeys(expected)), self._name(ids, begin + 1))

    def _read_places(self, ids: Tensor, begin: int, stop: int, *, span: _Span) -> Piece:
        assert span.placeholder is not None
        expected = f"{self._strings[span.placeholder]} or {self._strings[span.end]}"
        other = (ids[begin + 1 : stop] != span.placeholder).nonzero()
        place = begin + 1 + int(other[0]) if len(other) else stop
        if place < stop or stop == len(ids) or int(ids[stop]) != span.end:
            raise _wrong(place, expected, self._name(ids, place))
        return PlaceholderPiece(span.modality, stop - begin - 1, span.made)

    def _read_codes(self, ids: Tensor, begin: int, stop: int, *, span: _Span, codec: str) -> Piece:
        layout = self.codecs[codec]
        body = ids[begin + 1 : stop]
        length, follow = layout.read(body, limits=self._limits(codec, span.made))
        place = begin + 1 + length
        ended = place == stop and stop < len(ids) and int(ids[stop]) == span.end
        if not (ended and follow.end):
            expected = layout.describe(follow, self._strings[span.end])
            raise _wrong(place, expected, self._name(ids, place))
        return CodedPiece(codec, layout.unflatten(body), span.made)

    def _limits(self, codec: str, made: bool) -> Limits:
        return self.limits.get(codec, ANY_LENGTH) if made else ANY_LENGTH

    def _check_text(self, ids: Tensor, start: int) -> None:
        """Refuses what is no text from `start` on."""
        wrong = (~self._text[ids[start:]]).nonzero()
        if len(wrong):
            place = start + int(wrong[0])
            raise _wrong(place, "text or a begin marker", self._name(ids, place))

    def _name(self, ids: Tensor, position: int) -> str:
        """What stands at a position, in words."""
        if position >= len(ids):
            return "the end of the sequence"
        number = int(ids[position])
        index, local = self.space.to_local(ids[position : position + 1])
        found = self.space.ranges[int(index)]
        if found.kind == "codec":
            return f"id {number} (code {int(local)} of {found.name})"
        return f"id {number} ({self._strings.get(number, 'text')})"


def _layout(space: TokenSpace, codec: str) -> CodeLayout:
    return CodeLayout(space, [found.name for found in space.codebooks(codec)])


def _spans_of(space: TokenSpace, modality: Modality, codecs: Sequence[str]) -> list[_Span]:
    """The input and the output span of a modality, where the space has their markers."""
    found = space.special_ids
    placeholder = found.get(modality.placeholder)
    markers = [(False, modality.begin, modality.end), (True, modality.gen_begin, modality.gen_end)]
    return [
        _Span(modality.name, made, found[begin], found[end], placeholder, tuple(codecs))
        for made, begin, end in markers
        if begin in found and end in found
    ]


def _wrong(position: int, expected: str, got: str) -> SequenceError:
    return SequenceError(f"position {position}: expected {expected}, got {got}")
