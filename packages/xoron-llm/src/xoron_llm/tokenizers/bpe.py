"""Byte-level BPE: ranks to merges, and the `tokenizers` object made of them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from xoron_core.errors import FolderError
from xoron_core.tokens.byte_level import byte_alphabet

Merge = tuple[str, str]


def vocabulary_identity(vocab: Mapping[str, int]) -> str:
    """`sha256:...` over the tokens in the order of their ids."""
    text = json.dumps(sorted(vocab, key=vocab.__getitem__), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def byte_vocabulary() -> dict[str, int]:
    """The 256 bytes as the characters that stand for them, id = byte value."""
    return {character: value for value, character in byte_alphabet().items()}


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Reads a tiktoken file: one line per token, base64 and rank.

    Raises:
        FolderError: if it cannot be read or is no such file.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in Path(path).read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{path}: cannot be read as a tiktoken file ({error}); expected lines of a base64 token"
            " and its rank"
        ) from None
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that made the ranks, in their order: one per token of more than one byte.

    A token's two parts are what byte-pair encoding leaves of it when only merges of lower rank are
    allowed.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _parts(token, rank, ranks)
            merges.append((left, right))
    return merges


def _parts(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (ranks.get(a + b, limit) for a, b in pairwise(parts))
        rank, index = min((rank, index) for index, rank in enumerate(pairs))
        if rank >= limit:
            raise FolderError(
                f"rank {limit} ({token!r}) cannot be reached by merging tokens of lower rank; the"
                " tiktoken file is no byte-pair vocabulary"
            )
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def from_ranks(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[Merge]]:
    """Ranks to the vocabulary and merges of a byte-level BPE."""
    alphabet = byte_alphabet()

    def write(token: bytes) -> str:
        return "".join(alphabet[value] for value in token)

    vocab = {write(token): rank for token, rank in ranks.items()}
    return vocab, [(write(a), write(b)) for a, b in merges_of(ranks)]


def build(
    vocab: Mapping[str, int],
    merges: Sequence[Merge],
    *,
    pattern: str | None = None,
    nfc: bool = False,
) -> Tokenizer:
    """A `tokenizers` byte-level BPE.

    Args:
        vocab: token to id.
        merges: in order.
        pattern: regular expression whose matches are encoded apart; None takes a text whole.
        nfc: whether text is normalised to NFC first.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), fuse_unk=False))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        tokenizer.pre_tokenizer = to_bytes
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
