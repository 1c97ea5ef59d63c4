"""Proves that every position is labelled with the modality it belongs to: by the spans of media,
whatever slot consumes them, and by the codec range of an id that comes without media."""

from __future__ import annotations

import torch

from xoron_core.composer.composition import Composition
from xoron_core.modality_groups import group_names, position_groups
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace

COMPOSITION = Composition.parse(
    {
        "name": "labelled",
        "slots": {
            "tokenizer": {"kind": "tokenizer", "use": "byte", "modality": "text"},
            "backbone": {"kind": "backbone", "use": "any"},
            "image.encoder": {"kind": "encoder", "use": "eye", "modality": "image"},
            "audio.codec": {"kind": "codec", "use": "ear", "modality": "audio"},
            "image.generator": {"kind": "generator", "use": "brush", "modality": "image"},
        },
    }
)
SPACE = TokenSpace.allocate(
    text=TextBase(name="test/base", size=10, identity="sha256:test"),
    groups=[],
    codecs=[
        CodecRange("test/ear", codebook=q, size=4, identity="x", rate=None, modality="audio")
        for q in range(2)
    ],
)


def _label(ids: torch.Tensor | None, media: dict[str, dict[str, torch.Tensor]]) -> list[list[int]]:
    options = {"composition": COMPOSITION, "space": SPACE}
    groups = position_groups(torch.zeros(2, 8, 3), ids, media, **options)
    assert groups.dtype == torch.int64
    return groups.tolist()


def test_names_are_text_and_each_modality_once_in_the_order_of_slots() -> None:
    names = group_names(COMPOSITION)
    assert names[0] == "text"
    assert sorted(names[1:]) == ["audio", "image"]


def test_spans_and_codec_ids_decide() -> None:
    image, audio = (group_names(COMPOSITION).index(name) for name in ("image", "audio"))
    first = SPACE.range("test/ear:0").start
    ids = torch.arange(16).view(2, 8) % 10
    ids[0, 5], ids[0, 6] = first, first + 7  # the first code and the last one of both books
    media = {
        "image.encoder": {"spans": torch.tensor([[0, 1, 2], [1, 0, 3]]), "pixels": torch.zeros(2)},
        "image.generator": {"spans": torch.tensor([[1, 6, 2]])},
        "audio.codec": {"spans": torch.tensor([[1, 4, 1]])},
    }
    expected = [
        [0, image, image, 0, 0, audio, audio, 0],
        [image, image, image, 0, audio, 0, image, image],
    ]
    assert _label(ids, media) == expected
    expected[0][5] = expected[0][6] = 0
    assert _label(None, media) == expected  # embeddings alone: no ids to tell codes by


def test_media_without_spans_stand_in_no_sequence() -> None:
    assert _label(torch.zeros(2, 8), {"audio.codec": {"waves": torch.zeros(1)}}) == [[0] * 8] * 2
