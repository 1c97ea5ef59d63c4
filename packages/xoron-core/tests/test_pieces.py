"""Proves the grammar of whole sequences: building and parsing are inverse on any interleaving of
text and media, any one change is refused or read as another sequence, faults are named with their
position, and labels cover exactly the target.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xoron_core.descriptors import Modality, TokenGroup
from xoron_core.errors import SequenceError, TokenSpaceError
from xoron_core.losses import IGNORE
from xoron_core.pieces import CodedPiece, PlaceholderPiece, SpanGrammar, TextPiece
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace


def modality(name: str) -> Modality:
    markers = [f"<|{name}|>", f"<|/{name}|>", f"<|gen_{name}|>", f"<|/gen_{name}|>"]
    return Modality(name, (name,), *markers, f"<|{name}_pad|>", "x:load")


MODALITIES = {name: modality(name) for name in ("image", "audio")}
GROUPS = [TokenGroup("toy/turns", {"user": "<|user|>", "assistant": "<|assistant|>"})]
for kind in MODALITIES.values():
    strings = (kind.begin, kind.end, kind.gen_begin, kind.gen_end, kind.placeholder)
    GROUPS.append(TokenGroup(f"toy/{kind.name}", {string: string for string in strings}))
CODECS = [
    CodecRange("toy/grid", 0, 9, "grid", None, "image"),
    CodecRange("toy/other-grid", 0, 4, "other", None, "image"),
    *(CodecRange("toy/speech", q, 6, "speech", 12.5, "audio", delay=q) for q in range(3)),
]
SPACE = TokenSpace.allocate(
    text=TextBase("test/base", 20, "vocabulary"), groups=GROUPS, codecs=CODECS
)
GRAMMAR = SpanGrammar(SPACE, MODALITIES, limits={"toy/speech": (2, 5)})
BOOKS = {"toy/grid": (9,), "toy/other-grid": (4,), "toy/speech": (6, 6, 6)}


@st.composite
def coded(draw, codecs=tuple(BOOKS)):
    name = draw(st.sampled_from(codecs))
    frame = st.tuples(*(st.integers(0, size - 1) for size in BOOKS[name]))
    frames = draw(st.lists(frame, min_size=2, max_size=5))
    return CodedPiece(name, torch.tensor(frames), draw(st.booleans()))


words = st.sampled_from([*range(20), SPACE.id_of("user"), SPACE.id_of("assistant")])
text = st.lists(words, min_size=1, max_size=4).map(lambda ids: TextPiece(tuple(ids)))
held = st.builds(
    PlaceholderPiece, st.sampled_from(["image", "audio"]), st.integers(1, 4), st.booleans()
)
pieces = st.lists(text | coded() | held, max_size=6)


def merged(found):
    """Texts side by side become one."""
    result = []
    for piece in found:
        if result and isinstance(piece, TextPiece) and isinstance(result[-1], TextPiece):
            piece = TextPiece(result.pop().ids + piece.ids)
        result.append(piece)
    return result


@given(pieces)
@settings(deadline=None)
def test_parsing_undoes_building_on_any_interleaving(found):
    assert GRAMMAR.parse(GRAMMAR.build(found)) == merged(found)


@given(pieces, st.data())
@settings(deadline=None, max_examples=300)
def test_what_is_read_builds_the_same_ids_whatever_was_changed(found, data):
    """With one id replaced, dropped or doubled, a sequence is refused or means what it says."""
    ids = GRAMMAR.build(found).tolist()
    at = data.draw(st.integers(0, max(0, len(ids) - 1)))
    new = data.draw(st.lists(st.integers(0, SPACE.size - 1), max_size=2))
    changed = torch.tensor(ids[:at] + new + ids[at + 1 :], dtype=torch.int64)
    place = fault(changed)
    if place is None:
        assert torch.equal(GRAMMAR.build(GRAMMAR.parse(changed)), changed)
    else:
        assert at <= place <= len(changed)
        # It is the first fault: what is cut behind it has the same one, what is cut before has none
        # but its end.
        assert fault(changed[: place + 1]) == place
        assert fault(changed[:place]) in (None, place)


def fault(ids):
    """The position at which a sequence is refused, or None."""
    try:
        GRAMMAR.parse(ids)
    except SequenceError as error:
        found = re.match(r"position (\d+): expected .*, got ", str(error))
        return int(found[1])
    return None


def ids(*words):
    """Ids from numbers of the text base, strings, and (codec, codebook, code)."""
    return torch.tensor(
        [
            SPACE.range(f"toy/{w[0]}:{w[1]}").start + w[2]
            if isinstance(w, tuple)
            else SPACE.id_of(w)
            if isinstance(w, str)
            else w
            for w in words
        ]
    )


G, A, B, C = ("grid", 0, 3), ("speech", 0, 1), ("speech", 1, 2), ("speech", 2, 3)
IMAGE, SPEECH = ("<|image|>", "<|/image|>"), ("<|gen_audio|>", "<|/gen_audio|>")


@pytest.mark.parametrize(
    ("row", "position", "expected", "got"),
    [
        ((1, IMAGE[0], G), 3, r"toy/grid:0 or <\|/image\|>", "the end of the sequence"),
        ((1, IMAGE[0]), 2, r"toy/grid:0 or .*other-grid:0 or <\|image_pad\|>", "the end"),
        ((IMAGE[0], IMAGE[1]), 1, "toy/grid:0", r"<\|/image\|>"),
        ((1, IMAGE[1]), 1, "text or a begin marker", r"<\|/image\|>"),
        ((1, 2, G), 2, "text or a begin marker", "code 3 of toy/grid:0"),
        (("<|image_pad|>", 2), 0, "text or a begin marker", "image_pad"),
        ((IMAGE[0], G, IMAGE[0], G, IMAGE[1]), 2, r"<\|/image\|>", r"<\|image\|>"),
        ((IMAGE[0], G, SPEECH[1]), 2, r"toy/grid:0 or <\|/image\|>", r"<\|/gen_audio\|>"),
        ((IMAGE[0], G, 4, IMAGE[1]), 2, r"toy/grid:0 or <\|/image\|>", "id 4 .text."),
        ((IMAGE[0], A, IMAGE[1]), 1, "toy/grid:0", "code 1 of toy/speech:0"),
        ((IMAGE[0], G, ("other-grid", 0, 1), IMAGE[1]), 2, "toy/grid:0 or", "other-grid:0"),
        ((IMAGE[0], "<|image_pad|>", G, IMAGE[1]), 2, r"<\|image_pad\|> or", "toy/grid:0"),
        ((IMAGE[0], "<|image_pad|>", SPEECH[1]), 2, r"<\|/image\|>", r"<\|/gen_audio\|>"),
        # speech has the delays 0, 1, 2 and 2 to 5 frames: A A B A B C ... B C C
        ((SPEECH[0], A, B, SPEECH[1]), 2, "toy/speech:0, got", "toy/speech:1"),
        ((SPEECH[0], A, A, C, SPEECH[1]), 3, "toy/speech:1", "toy/speech:2"),
        ((SPEECH[0], A, A, B, B, C, SPEECH[1]), 6, "toy/speech:2, got", r"<\|/gen_audio\|>"),
        ((SPEECH[0], A, A, B, B, C, C, C, SPEECH[1]), 7, r"<\|/gen_audio\|>, got", "speech:2"),
        (
            (SPEECH[0], A, A, B, A, B, C, A, B, C, A, B, C, A, SPEECH[1]),
            13,
            "toy/speech:1, got",
            "toy/speech:0",
        ),
    ],
)
def test_a_fault_is_refused_with_its_position_and_what_was_expected(row, position, expected, got):
    with pytest.raises(SequenceError, match=rf"^position {position}: expected .*{expected}.*{got}"):
        GRAMMAR.parse(ids(*row))


def test_input_may_be_longer_or_shorter_than_what_is_made():
    for frames in (1, 9):
        piece = CodedPiece("toy/speech", torch.zeros(frames, 3, dtype=torch.int64))
        assert GRAMMAR.parse(GRAMMAR.build([piece])) == [piece]
        with pytest.raises(SequenceError, match=f"2 to 5 frames, got {frames}"):
            GRAMMAR.build([CodedPiece("toy/speech", piece.codes, made=True)])


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (TextPiece((1, SPACE.id_of("<|image|>"))), "position 1: expected text"),
        (TextPiece((1, SPACE.range("toy/grid:0").start)), "position 1: expected text"),
        (CodedPiece("toy/grid", torch.zeros(0, 1, dtype=torch.int64)), "frames >= 1, 1"),
        (CodedPiece("toy/grid", torch.zeros(2, 2, dtype=torch.int64)), "frames >= 1, 1"),
        (CodedPiece("toy/none", torch.zeros(2, 1, dtype=torch.int64)), "toy/grid, toy/other-grid"),
        (PlaceholderPiece("image", 0), "1 or more positions"),
        (PlaceholderPiece("smell", 1), "markers and a placeholder of 'smell'"),
    ],
)
def test_pieces_that_no_sequence_holds_are_refused(piece, message):
    with pytest.raises(SequenceError, match=message):
        GRAMMAR.build([piece])


@pytest.mark.parametrize("number", [-1, SPACE.size])
def test_ids_outside_the_space_and_codes_outside_their_codebook_are_refused(number):
    with pytest.raises(TokenSpaceError, match=rf"id {number} at position \(1,\)"):
        GRAMMAR.parse(torch.tensor([0, number]))
    with pytest.raises(TokenSpaceError, match="id 9 at position"):
        GRAMMAR.build([CodedPiece("toy/grid", torch.tensor([[9]]))])


def test_holes_are_no_ids_and_removed_codecs_carry_nothing():
    space = TokenSpace.allocate(text=SPACE.text, groups=GROUPS, codecs=CODECS[1:], lock=SPACE)
    grammar = SpanGrammar(space, MODALITIES)
    with pytest.raises(TokenSpaceError, match="a removed token"):
        grammar.parse(ids(IMAGE[0], G, IMAGE[1]))
    piece = CodedPiece("toy/other-grid", torch.tensor([[1], [2]]))
    assert grammar.parse(GRAMMAR.build([piece])) == [piece]


TALK = [TextPiece((1, 2))], [TextPiece((3, 4))]
SEEN, DRAWN = (CodedPiece("toy/grid", torch.tensor([[5], [6]]), made) for made in (False, True))
HEARD, SPOKEN = (
    CodedPiece("toy/speech", torch.tensor([[0, 1, 2], [3, 4, 5]]), made) for made in (False, True)
)


@pytest.mark.parametrize(
    ("prompt", "target", "learned"),
    [
        ([TALK[0][0]], TALK[1], 2),
        ([SEEN], TALK[1], 2),
        (TALK[0], [DRAWN], 2 + 2),
        ([HEARD], TALK[1], 2),
        (TALK[0], [SPOKEN], 6 + 2),
        ([*TALK[0], SEEN, HEARD], [*TALK[1], DRAWN, *TALK[0], SPOKEN], 2 + 4 + 2 + 8),
        (TALK[0], [*TALK[1], PlaceholderPiece("image", 5, made=True)], 2 + 2),
    ],
    ids=[
        "text-text", "image-text", "text-image", "audio-text", "text-audio", "interleaved",
        "generator",
    ],
)  # fmt: skip
def test_labels_cover_the_target_with_its_markers_and_nothing_else(prompt, target, learned):
    row, labels = GRAMMAR.example(prompt, target)
    assert GRAMMAR.parse(row) == merged([*prompt, *target])
    behind = len(GRAMMAR.build(prompt))
    assert (labels[:behind] == IGNORE).all()
    said = labels[behind:]
    assert int((said != IGNORE).sum()) == learned
    places = said == IGNORE
    assert torch.equal(said[~places], row[behind:][~places])
    assert (row[behind:][places] == SPACE.id_of("<|image_pad|>")).all()
    first, last = target[0], target[-1]
    if isinstance(first, CodedPiece):
        assert int(said[0]) == SPACE.id_of(f"<|gen_{'image' if first is DRAWN else 'audio'}|>")
    if isinstance(last, CodedPiece):
        assert int(said[-1]) == SPACE.id_of(f"<|/gen_{'image' if last is DRAWN else 'audio'}|>")
