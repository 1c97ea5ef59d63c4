"""A medium is a word of capital letters; the model made by hand says the letters it is shown.

Text means nothing to it, but for a capital letter that is said, which ends the answer. Shown one
letter, it says that letter with a probability that `gain` decides: near 1 for 8, as any other for
0, near 0 for -8. A word may also come in as ids of a codec, one for each letter, and be made so: a
small letter that the user writes asks for the word of that one letter.

Shapes: M words, L letters of the longest, E = 26, D rows of the token space, B rows, N positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from xoron_core.components import (
    Backbone,
    BackboneOutput,
    Codec,
    CodecRange,
    Codes,
    Encoder,
    Features,
    Projector,
)
from xoron_core.config import Config
from xoron_core.errors import DataError

CODEC = "xoron-letters/letters"
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LetterEncoderConfig(Config):
    """Nothing to choose."""


class LetterProjectorConfig(Config):
    """How much a letter shown adds to the logit of that letter said."""

    gain: float = 8.0


class LetterCodecConfig(Config):
    """Nothing to choose."""


class SpellerConfig(Config):
    """How much a letter said adds to the logit of the end, of the answer or of the word; a letter
    shown as an id to that of the letter said; a small letter written to that of the letter made."""

    end: float = 16.0
    reads: float = 8.0
    asked: float = 8.0


def load(media: str) -> str:
    """The word itself, or the last part of a path, which is what a data file's words become."""
    word = Path(media).name
    if not word or set(word) - set(ALPHABET):
        raise DataError(f"word: {word!r} is no word of capital letters")
    return word


class LetterProcessor:
    """Words to indices of letters."""

    def load(self, media: str) -> dict[str, Any]:
        return {"letters": np.array([ALPHABET.index(letter) for letter in media])}

    def collate(self, items: Any) -> dict[str, Tensor]:
        longest = max(len(item["letters"]) for item in items)
        letters = torch.full((len(items), longest), -1)
        for row, item in zip(letters, items, strict=True):
            row[: len(item["letters"])] = torch.from_numpy(item["letters"])
        return {"letters": letters}

    def num_positions(self, item: Any) -> int:
        return len(item["letters"])


class LetterEncoder(Encoder):
    """One-hot; what stands behind the end of a word is garbage."""

    def __init__(self, config: LetterEncoderConfig, context: Any) -> None:
        super().__init__(config, context)
        self.feature_size = len(ALPHABET)
        self.table = nn.Parameter(torch.eye(len(ALPHABET)))

    @classmethod
    def processor(cls, config: LetterEncoderConfig) -> LetterProcessor:
        return LetterProcessor()

    def forward(self, letters: Tensor) -> Features:
        mask = letters >= 0
        values = self.table[letters.clamp(min=0)]
        return Features(torch.where(mask[..., None], values, 77.0), mask)

    def dummy_batch(self) -> dict[str, Tensor]:
        return {"letters": torch.zeros(1, 1, dtype=torch.int64)}


class LetterProjector(Projector):
    """A letter shown to the direction of that letter said."""

    def __init__(self, config: LetterProjectorConfig, context: Any) -> None:
        super().__init__(config, context)
        self.layer = nn.Linear(len(ALPHABET), context.hidden_size, bias=False)
        with torch.no_grad():
            self.layer.weight.zero_()
            for index, letter in enumerate(ALPHABET):
                self.layer.weight[ord(letter), index] = config.gain

    @classmethod
    def num_positions(cls, config: LetterProjectorConfig, num_features: int) -> int:
        return num_features

    def forward(self, features: Features) -> Features:
        return features._replace(values=self.layer(features.values))


class LetterCodec(Codec):
    """A letter to its index; a word of one to three letters to their indices."""

    def __init__(self, config: LetterCodecConfig, context: Any) -> None:
        super().__init__(config, context)
        self.table = nn.Parameter(torch.arange(26.0))

    @classmethod
    def processor(cls, config: LetterCodecConfig) -> LetterProcessor:
        return LetterProcessor()

    @classmethod
    def ranges(cls, config: LetterCodecConfig) -> list[CodecRange]:
        return [CodecRange(CODEC, 0, len(ALPHABET), "letters", None, "word")]

    @classmethod
    def frame_limits(cls, config: LetterCodecConfig) -> tuple[int, int]:
        return 1, 3

    def encode(self, letters: Tensor) -> Codes:
        return Codes(letters.clamp(min=0)[..., None], letters >= 0, [{} for _ in letters])

    def decode(self, ids: Tensor, metadata: Any) -> Tensor:
        return self.table[ids[0, :, 0]]

    def dummy_batch(self) -> dict[str, Tensor]:
        return {"letters": torch.zeros(1, 1, dtype=torch.int64)}


class SpellerModel(nn.Module):
    """Ids to logits of their own."""

    def __init__(self, rows: int, end_id: int, end: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, rows)
        self.head = nn.Linear(rows, rows, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(rows))
            self.embedding.weight.zero_()
            for letter in ALPHABET:
                self.embedding.weight[ord(letter), end_id] = end

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Speller(Backbone):
    """The sum of all embeddings so far; the sums run over a document from its begin."""

    honours_documents = False

    def __init__(self, config: SpellerConfig, context: Any) -> None:
        super().__init__(config, context)
        rows = context.space.size
        self.hidden_size = rows
        self.model = SpellerModel(rows, context.space.id_of("<|/assistant|>"), config.end)
        if any(found.name == f"{CODEC}:0" for found in context.space.ranges):
            first = context.space.range(f"{CODEC}:0").start
            weight, end_id = self.model.embedding.weight.data, context.space.id_of("<|/gen_word|>")
            for code, letter in enumerate(ALPHABET, first):
                weight[code, ord(letter)] = config.reads
                weight[ord(letter.lower()), code] = config.asked
                weight[code, end_id] = config.end

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embedding(input_ids)

    def forward(self, embeddings: Tensor, *, cache: Any = None, use_cache: bool = False, **_: Any):
        if cache is None and use_cache:
            cache = DynamicCache()
        seen = embeddings
        if cache is not None:
            keys = embeddings[:, None]
            seen = cache.update(keys, keys, 0)[0][:, 0]
        return BackboneOutput(seen.cumsum(1)[:, -embeddings.shape[1] :], cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def resize_rows(self, rows: int, new_rows: Tensor, generator: torch.Generator) -> None:
        raise NotImplementedError

    def hf_fields(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": self.hidden_size,
        }
