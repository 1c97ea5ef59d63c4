"""The zig-zag order in which a sequence is shared by W processes under causal attention.

The sequence is cut into 2 W chunks and process r holds chunks r and 2 W - 1 - r. An early chunk has
few keys to look at and a late one many, so every pair costs the same; with contiguous shards the
last process would do almost twice the average (3 : 1 for two).

Footguns:
- A shard's neighbours are not the sequence's: positions and next-token labels are made *before*
  sharding (`positions`, `next_labels`), never from the shard.
- The length must be a multiple of 2 W (`padding` says how much is missing). Pad at the end: under
  a causal mask nobody sees it, and its labels are -100.

Shapes: B rows, N positions of the sequence, n = N / W of a shard, W processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xoron_core.errors import SequenceError
from xoron_core.losses import IGNORE, target_mask


def padding(length: int, world_size: int) -> int:
    """How many positions are missing to a length that W processes can share."""
    return -length % (2 * world_size)


def positions(
    length: int, *, rank: int, world_size: int, device: torch.device | None = None
) -> Tensor:
    """Global positions (n,) int64 of a shard, ascending.

    Raises:
        SequenceError: if N is no multiple of 2 W or there is no such rank.
    """
    size = _chunk(length, world_size)
    if not 0 <= rank < world_size:
        raise SequenceError(f"rank is {rank}, expected 0 .. {world_size - 1}")
    own = torch.arange(size, device=device)
    return torch.cat((own + rank * size, own + (2 * world_size - 1 - rank) * size))


def shard(tensor: Tensor, *, rank: int, world_size: int, dim: int = 1) -> Tensor:
    """A process's part along `dim`: N to n, of ids, labels, positions or embeddings alike.

    Raises:
        SequenceError: as `positions`.
    """
    index = positions(tensor.shape[dim], rank=rank, world_size=world_size, device=tensor.device)
    return tensor.index_select(dim, index)


def unshard(shards: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """The sequence from its shards in the order of ranks; the reverse of `shard`.

    Raises:
        SequenceError: if a shard cannot be halved.
    """
    sizes = {tensor.shape[dim] for tensor in shards}
    if len(sizes) != 1 or (size := sizes.pop()) % 2:
        raise SequenceError(
            f"shards have {sorted(sizes) or size} positions along dimension {dim}, expected the"
            " same even number in each"
        )
    halves = [tensor.chunk(2, dim) for tensor in shards]
    return torch.cat([early for early, _ in halves] + [late for _, late in halves[::-1]], dim)


def next_labels(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The label that each position predicts, aligned with it, so that shards keep their pairs.

    Args:
        labels: (B, N) aligned with the inputs, -100 where nothing is learned.
        document_ids: (B, N) or None; the last position of a document predicts nothing.

    Returns:
        (B, N): column n holds the label at n + 1, or -100. After `shard`, the hidden states where
        it is not -100 go to `losses.token_loss` with it.
    """
    kept = torch.where(target_mask(labels, document_ids), labels[:, 1:], IGNORE)
    return torch.cat((kept, torch.full_like(labels[:, :1], IGNORE)), 1)


def _chunk(length: int, world_size: int) -> int:
    if length % (2 * world_size) or world_size < 1:
        raise SequenceError(
            f"a sequence of {length} positions cannot be shared in zig-zag order by {world_size}"
            f" processes: expected a multiple of {2 * world_size}; pad"
            f" {padding(length, world_size)} more positions at its end"
        )
    return length // (2 * world_size)
