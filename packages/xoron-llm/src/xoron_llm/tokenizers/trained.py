"""Byte-level BPE of one's own: learned from one's texts, opened from its tokenizer.json.

A model that starts from random weights on a narrow task learns it several times faster where a word
is one token. With all 256 bytes in the vocabulary no text is lost, and nothing is normalised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import trainers
from transformers import PreTrainedTokenizerFast

from xoron_core.components import Tokenizer
from xoron_core.errors import ConfigError, FolderError
from xoron_core.tokens.byte_level import byte_alphabet
from xoron_core.tokens.space import TextBase
from xoron_llm.tokenizers import bpe
from xoron_llm.tokenizers.config import BpeConfig

# Words with the space before them, runs of letters, single digits, runs of other signs.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
_BYTES = 256


class BpeTokenizer(Tokenizer):
    """256 bytes and the merges of a tokenizer.json; lossless for every text."""

    config: BpeConfig

    def text_base(self) -> TextBase:
        """Its ids; they own no special string.

        Raises:
            FolderError: if the source is no byte-level BPE without added tokens.
        """
        vocab, _ = self._read
        return TextBase(
            name="xoron-llm/bpe", size=len(vocab), identity=bpe.vocabulary_identity(vocab)
        )

    def base(self) -> PreTrainedTokenizerFast:
        """The tokenizer; raises as `text_base`."""
        vocab, merges = self._read
        backend = bpe.build(vocab, merges, pattern=PATTERN)
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)

    @cached_property
    def _read(self) -> tuple[dict[str, int], list[bpe.Merge]]:
        if self.config.source is None:
            return bpe.byte_vocabulary(), []
        path = Path(self.config.source)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text("utf-8"))
            model, added = data["model"], data["added_tokens"]
            vocab = dict(model["vocab"])
            merges = [(left, right) for left, right in model["merges"]]
            splits = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise FolderError(
                f"tokenizer bpe: {path}: cannot be read as a tokenizer.json of `xoron tokenizer`"
                f" ({type(error).__name__}: {error})"
            ) from None
        ids = sorted(vocab.values())
        whole = ids == list(range(len(ids))) and bpe.byte_vocabulary().keys() <= vocab.keys()
        if added or splits != PATTERN or not whole:
            raise FolderError(
                f"tokenizer bpe: {path}: expected the 256 bytes and their merges, ids without a"
                " gap, no added tokens and this tokenizer's splitting; make it with `xoron"
                " tokenizer`, or name the family it belongs to (use: qwen2.5)"
            )
        return vocab, merges


def learn(texts: Iterable[str], *, size: int) -> Backend:
    """Learns byte-pair merges (Sennrich et al. 2016) from texts.

    Args:
        texts: what to learn from.
        size: ids at most, the 256 bytes among them; fewer where the texts have no more pairs.

    Returns:
        A tokenizer whose `save` writes what `BpeTokenizer` opens.

    Raises:
        ConfigError: for a size that holds no merge.
    """
    if size <= _BYTES:
        raise ConfigError(f"a tokenizer of {size} ids has no merge: expected more than {_BYTES}")
    backend = bpe.build(bpe.byte_vocabulary(), [], pattern=PATTERN)
    alphabet = sorted(byte_alphabet().values())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def write(learned: Backend, path: str | Path) -> None:
    """Writes what `BpeTokenizer` opens.

    Raises:
        FolderError: if the file cannot be written.
    """
    try:
        Path(path).write_text(learned.to_str(pretty=True), "utf-8")
    except OSError as error:
        raise FolderError(f"{path}: cannot be written ({error})") from None
