"""Ring attention: exact attention over a sequence that is shared by the processes of a group.

Every process keeps its queries; keys and values go round the ring, and while a process attends to
one shard the next is under way (Liu, Zaharia and Abbeel, 2023). Results merge by their
log-sum-exp. In the backward pass keys and values go round once more, followed by their gradients,
to which each process adds its share, and which are home after the last step.

Footguns:
- Under a causal mask shards are in the order of `nn.zigzag`; with it every process does the same
  work in every step. Full attention takes any equal shards.
- Collective: all processes of the group call it equally often in the same order, with equal
  shapes. A process that does not, hangs the others.
- The gradients of a model's parameters are each process's share: sum them over the group.
- Process 0 never merges late shards into its early half, so a test has to look at every rank.

Shapes: B rows, n = N / W local positions, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from xoron_core.errors import SequenceError
from xoron_core.nn import zigzag
from xoron_core.nn.blockwise import Block, block_backward, block_forward, merge_, prepare

Group: TypeAlias = "dist.ProcessGroup | None"  # not evaluated: some builds of torch have none

_KEYS_VALUES, _GRADIENTS = 0, 1  # message tags: both are under way at once in the backward pass


class Step(NamedTuple):
    """What a process computes while it holds the keys of another.

    Attributes:
        source: the rank whose keys and values these are.
        queries: the local queries that take part.
        keys: the keys of the source that take part.
        causal: whether they are the same positions, under a causal mask.
    """

    source: int
    queries: slice
    keys: slice
    causal: bool


def plan(length: int, *, rank: int, world_size: int, causal: bool = True) -> list[Step]:
    """The steps of one process, own keys first, then those of rank - 1, rank - 2 and so on.

    In zig-zag order, of an earlier rank's keys the early half lies before all local queries and
    the late half behind them; of a later rank's keys all lie before the late local queries and
    behind the early ones. Either way half of the pairs count, and no mask is needed.

    Args:
        length: n.
        rank, world_size: of the process.
        causal: False for attention to everything.
    """
    everything, half = slice(0, length), length // 2
    steps = []
    for distance in range(world_size):
        source = (rank - distance) % world_size
        queries = keys = everything
        if causal and source < rank:
            keys = slice(0, half)
        elif causal and source > rank:
            queries = slice(half, length)
        steps.append(Step(source, queries, keys, causal and source == rank))
    return steps


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of this process's queries to the keys of all processes.

    Args:
        q: (B, H, n, d), rotated by its global positions.
        k, v: (B, G, n, d) with G dividing H.
        group: the processes that share the sequence; None for all.
        causal: whether a query sees only positions up to its own (zig-zag shards).
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        (B, H, n, d).

    Raises:
        SequenceError: if shapes or types do not fit, or causal shards cannot be halved.
        XoronError: on a device without a fused kernel.
    """
    q, k, v = prepare(q, k, v)
    if causal and q.shape[2] % 2:
        raise SequenceError(
            f"a causal shard has {q.shape[2]} positions, expected an even number: two chunks in"
            " zig-zag order; see xoron_core.nn.zigzag.padding"
        )
    result: Tensor = _RingAttention.apply(q, k, v, group, causal, scale)
    return result


@torch.no_grad()
def gather(tensor: Tensor, *, dim: int = 1, group: Group = None) -> Tensor:
    """A zig-zag sharded tensor whole on every process, without gradient."""
    tensor = tensor.contiguous()
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, tensor, group=group)
    return zigzag.unshard(shards, dim=dim)


class _Ring:
    """Passes tensors to the next process of a group while receiving the previous one's."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def start(self, tensor: Tensor, tag: int) -> _Exchange:
        """Sends `tensor` on; must not be changed before the exchange is over."""
        if self.world == 1:
            return _Exchange(tensor, tensor, [])
        received = torch.empty_like(tensor)
        ahead, behind = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        sides = [
            dist.P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=ahead),
            dist.P2POp(dist.irecv, received, group=self.group, tag=tag, group_peer=behind),
        ]
        return _Exchange(received, tensor, dist.batch_isend_irecv(sides))


class _Exchange(NamedTuple):
    """A transfer under way; `sent` is held so that its memory lives until the end."""

    received: Tensor
    sent: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, causal: bool, scale: float | None
    ) -> Tensor:
        ring = _Ring(group)
        steps = plan(q.shape[2], rank=ring.rank, world_size=ring.world, causal=causal)
        pair = torch.stack((k, v))  # one message
        out, lse = q, q
        seeds: tuple[Tensor, ...] = ()
        for index, step in enumerate(steps):
            last = index + 1 == len(steps)
            following = None if last else ring.start(pair, _KEYS_VALUES)
            keys, values = pair[:, :, :, step.keys]
            block = block_forward(
                q[:, :, step.queries], keys, values, causal=step.causal, scale=scale
            )
            if index == 0:
                out, lse, seeds = block.out.to(block.lse.dtype), block.lse, block.seeds
            else:
                merge_(out[:, :, step.queries], lse[:, :, step.queries], block)
            pair = pair if following is None else following.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *seeds)
        ctx.options = group, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *seeds = ctx.saved_tensors
        group, causal, scale = ctx.options
        ring = _Ring(group)
        pair, dq = torch.stack((k, v)), torch.zeros_like(q, dtype=lse.dtype)
        share = following = None
        for step in plan(q.shape[2], rank=ring.rank, world_size=ring.world, causal=causal):
            last = step.source == (ring.rank + 1) % ring.world
            following = None if last else ring.start(pair, _KEYS_VALUES)
            keys, values = pair[:, :, :, step.keys]
            mine = (slice(None), slice(None), step.queries)
            part_q, part_k, part_v = block_backward(
                grad_out[mine],
                q[mine],
                keys,
                values,
                block=Block(out[mine], lse[mine], tuple(seeds)),
                causal=step.causal,
                scale=scale,
            )
            dq[mine] += part_q
            # What the processes before this one have gathered for these keys.
            total = torch.zeros_like(pair, dtype=lse.dtype) if share is None else share.wait()
            total[0, :, :, step.keys] += part_k
            total[1, :, :, step.keys] += part_v
            share = ring.start(total, _GRADIENTS)
            pair = pair if following is None else following.wait()
        assert share is not None
        dk, dv = share.wait().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None
