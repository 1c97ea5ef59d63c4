"""Positions and attention masks from padding and packed documents, vectorised.

A mask is boolean, True where a query may look. Every query may look at itself, also where it is
padding: a row without any allowed key is where attention kernels differ (zero, mean or NaN), and
what a padded position computes is read by nobody.

The same facts come in three forms: dense (`causal_mask`), as blocks of which empty ones are never
computed (`block_mask`, for FlexAttention), and as lengths (`segments`, for variable-length flash).

Footguns:
- With a cache, `attention_mask` and `document_ids` cover the cached positions too: (B, past + N).
- Deciding that no mask is needed reads the tensors' values, a synchronisation on an accelerator;
  it is skipped while compiling, where a given mask is always applied.
- In `segments` a document is a run of equal ids; in a mask, all positions of one id.

Shapes: B rows, N queries, S keys (past + N, or the length of a static cache).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from xoron_core.errors import SequenceError


def check_columns(name: str, tensor: Tensor | None, *, past: int, length: int) -> None:
    """Refuses a (B, M) tensor that does not cover the cached positions and the new ones.

    Raises:
        SequenceError: with both numbers.
    """
    if tensor is not None and tensor.shape[-1] != past + length:
        raise SequenceError(
            f"{name} has {tensor.shape[-1]} columns, expected {past + length} ({past} cached +"
            f" {length} new positions); pass one that covers the cached positions too"
        )


def causal_mask(
    length: int,
    *,
    past: int = 0,
    keys: int | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """The mask of N new positions over the cached ones and themselves.

    Args:
        length: N.
        past: number of cached positions.
        keys: S, if the cache is longer than past + N.
        attention_mask: (B, past + N), nonzero where valid, or None for all valid.
        document_ids: (B, past + N), 1.. per document and 0 for padding, or None.
        device: where to make it; that of the tensors if any is given.

    Returns:
        (B or 1, 1, N, S) bool, or None where plain causal attention (N = S) or attention to
        every key (N = 1, S = past + 1) is meant.

    Raises:
        SequenceError: if a tensor does not have past + N columns.
    """
    check_columns("attention_mask", attention_mask, past=past, length=length)
    check_columns("document_ids", document_ids, past=past, length=length)
    keys = past + length if keys is None else keys
    attention_mask, document_ids = telling(attention_mask, document_ids)
    no_tensors = attention_mask is None and document_ids is None
    if no_tensors and keys == past + length and (past == 0 or length == 1):
        return None
    given = attention_mask if attention_mask is not None else document_ids
    device = given.device if given is not None else device
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    allowed = (key <= query)[None]
    if attention_mask is not None:
        allowed = allowed & _to_keys(attention_mask != 0, keys)[:, None, :]
    if document_ids is not None:
        documents = _to_keys(document_ids, keys)
        same = document_ids[:, past:, None] == documents[:, None, :]
        allowed = allowed & same & (documents != 0)[:, None, :]
    return (allowed | (key == query)).unsqueeze(1)


def telling(
    attention_mask: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The two tensors, each None where it keeps nothing apart."""
    if attention_mask is not None and _says_nothing(attention_mask != 0):
        attention_mask = None
    if document_ids is not None and _says_nothing(document_ids == document_ids[:, :1]):
        # One document per row keeps nothing apart; what is all padding must still be seen by none.
        document_ids = None if _says_nothing(document_ids != 0) else document_ids
    return attention_mask, document_ids


def block_mask(
    length: int,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> BlockMask:
    """`causal_mask` without a cache, as FlexAttention takes it (Dong et al., 2024).

    Args:
        length: N.
        attention_mask, document_ids: (B, N) as for `causal_mask`, or None.
        device: where to make it if neither tensor is given.

    Raises:
        SequenceError: if a tensor does not have N columns.
    """
    check_columns("attention_mask", attention_mask, past=0, length=length)
    check_columns("document_ids", document_ids, past=0, length=length)
    given = [t for t in (attention_mask, document_ids) if t is not None]
    device = given[0].device if given else device

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if attention_mask is not None:
            seen = seen & (attention_mask[row, key] != 0)
        if document_ids is not None:
            document = document_ids[row, key]
            seen = seen & (document != 0) & (document_ids[row, query] == document)
        return seen | (key == query)

    return create_block_mask(
        allowed,
        given[0].shape[0] if given else None,
        None,
        length,
        length,
        device=device or "cpu",
        # Compiled, the N x N mask is never whole in memory; on a CPU that is not worth compiling.
        _compile=device is not None and device.type == "cuda",
    )


class Segments(NamedTuple):
    """Stretches of the B * N positions, row after row, that attend within themselves only.

    Attributes:
        starts: (segments + 1,) int32, where each begins, and B * N.
        longest: positions of the longest.
    """

    starts: Tensor
    longest: int


def segments(document_ids: Tensor, attention_mask: Tensor | None = None) -> Segments:
    """Packed documents as lengths; a stretch of padding is a segment too, that nobody reads.

    Args:
        document_ids: (B, N), 1.. per document and 0 for padding.
        attention_mask: (B, N) or None.

    Raises:
        SequenceError: if the mask hides a position of a document.
    """
    if attention_mask is not None and bool(((attention_mask == 0) & (document_ids != 0)).any()):
        raise SequenceError(
            "attention_mask hides positions inside packed documents, which lengths cannot say;"
            " give them document id 0 (padding), or use attn_implementation='sdpa'"
        )
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = first.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(starts, (0, 1), value=document_ids.numel()).int()
    return Segments(starts, int(starts.diff().max()))


def positions(
    length: int,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The default positions of N new tokens.

    They start at 0 with each document, or with the first valid token of a left-padded row, or
    with the row. A document is a run of equal ids.

    Args:
        length: N.
        past: number of cached positions.
        attention_mask: (B, past + N) or None.
        document_ids: (B, past + N) or None; they decide if both are given.
        device: where to make them if neither tensor is given.

    Returns:
        (B or 1, N) int64.

    Raises:
        SequenceError: if a tensor does not have past + N columns.
    """
    check_columns("attention_mask", attention_mask, past=past, length=length)
    check_columns("document_ids", document_ids, past=past, length=length)
    if document_ids is not None:
        index = torch.arange(past + length, device=document_ids.device).expand_as(document_ids)
        starts = torch.zeros_like(index)
        new = document_ids[:, 1:] != document_ids[:, :-1]
        starts[:, 1:] = torch.where(new, index[:, 1:], 0)
        return (index - starts.cummax(dim=1).values)[:, past:]
    if attention_mask is not None:
        counted = (attention_mask != 0).long().cumsum(-1) - 1
        return counted.clamp_(min=0)[:, past:]
    return torch.arange(past, past + length, device=device).unsqueeze(0)


def valid_positions(
    attention_mask: Tensor | None, document_ids: Tensor | None, *, length: int
) -> Tensor | None:
    """Which of the last N positions hold a token.

    Args:
        attention_mask: (B, S), nonzero where valid, or None.
        document_ids: (B, S), 0 for padding, or None.
        length: N.

    Returns:
        (B, N) bool, or None where neither is given.
    """
    given = [t[:, -length:] != 0 for t in (attention_mask, document_ids) if t is not None]
    if not given:
        return None
    return given[0] if len(given) == 1 else given[0] & given[1]


def _says_nothing(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, if its values may be read at all."""
    return not torch.compiler.is_compiling() and bool(condition.all())


def _to_keys(tensor: Tensor, keys: int) -> Tensor:
    """(B, M) to (B, S); keys of a static cache that are not filled yet come out as zero."""
    return torch.nn.functional.pad(tensor, (0, keys - tensor.shape[-1]))
