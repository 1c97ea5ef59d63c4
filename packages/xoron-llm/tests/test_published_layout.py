"""Proves the published token layout over a Qwen3 vocabulary, id for id.

151,669 text ids, 64 special tokens, 8,192 image codes and 4 x 1,024 audio codes are 164,021 ids,
of which 12,352 are new. Every media id maps to its code and back; -1 and the size of a range are
no code.
"""

from __future__ import annotations

import pytest
import torch

from xoron_core.components import Context
from xoron_core.descriptors import TokenGroup
from xoron_core.errors import TokenSpaceError
from xoron_core.losses import codec_ranges
from xoron_core.tokens.space import CodecRange, TokenSpace
from xoron_llm.tokenizers.config import QwenConfig
from xoron_llm.tokenizers.qwen import QwenTokenizer

TEXT, SPECIALS, IMAGE, AUDIO, BOOKS = 151_669, 64, 8_192, 1_024, 4
NEW = SPECIALS + IMAGE + BOOKS * AUDIO


@pytest.fixture(scope="module")
def space() -> TokenSpace:
    config = QwenConfig(source="Qwen/Qwen3-8B")
    text = QwenTokenizer(config, Context(slot="tokenizer")).text_base()
    tokens = {f"uti_{i}": f"<|uti_{i}|>" for i in range(SPECIALS)}
    image = CodecRange("xoron-vision/image", 0, IMAGE, "image codes", None, "image")
    audio = [
        CodecRange("xoron-audio/audio", book, AUDIO, "audio codes", 150.0, "audio")
        for book in range(BOOKS)
    ]
    # The published order has the image before the audio: allocated first, and locked.
    first = TokenSpace.allocate(text=text, groups=[TokenGroup("test/uti", tokens)], codecs=[image])
    groups = [TokenGroup("test/uti", tokens)]
    return TokenSpace.allocate(text=text, groups=groups, codecs=[image, *audio], lock=first)


def test_the_numbers(space: TokenSpace) -> None:
    assert (space.text_size, space.size, NEW) == (TEXT, 164_021, 12_352)
    starts = [TEXT, TEXT + SPECIALS, *(TEXT + SPECIALS + IMAGE + q * AUDIO for q in range(BOOKS))]
    assert [one.start for one in space.ranges if one.start >= TEXT] == starts
    assert codec_ranges(space)[0] == (151_733, 159_925)
    assert codec_ranges(space)[-1] == (162_997, 164_021)
    # The checkpoint's 151,936 rows hold 267 rows of padding; ids on them are new all the same.
    assert space.new_rows(151_936).tolist() == list(range(TEXT, 164_021))


def test_every_media_id_is_one_code(space: TokenSpace) -> None:
    names = ["xoron-vision/image:0", *(f"xoron-audio/audio:{q}" for q in range(BOOKS))]
    seen = []
    for name in names:
        codes = torch.arange(space.range(name).size)
        ids = space.to_global(name, codes)
        index, local = space.to_local(ids)
        assert torch.equal(local, codes)
        assert {space.ranges[int(i)].name for i in index.unique()} == {name}
        seen.append(ids)
    assert torch.cat(seen).tolist() == list(range(TEXT + SPECIALS, 164_021))


@pytest.mark.parametrize("wrong", [-1, "size"])
def test_no_code_outside_its_range_becomes_another_medium(space: TokenSpace, wrong) -> None:
    for one in space.ranges:
        if one.kind == "codec":
            code = one.size if wrong == "size" else wrong
            with pytest.raises(TokenSpaceError, match=rf"id {code} at position \(1,\) is outside"):
                space.to_global(one.name, torch.tensor([0, code]))
    number = space.size if wrong == "size" else wrong
    with pytest.raises(TokenSpaceError, match=r"is outside 0 \.\. 164020"):
        space.to_local(torch.tensor([number]))
