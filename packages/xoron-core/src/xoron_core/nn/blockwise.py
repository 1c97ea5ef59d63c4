"""Exact attention from blocks of queries and keys: the block kernel, the merge, one device.

A block is attention of some queries to some keys by torch's fused kernel, which also gives the
log-sum-exp of each query's scores. Two such results over different keys merge into the result
over both (Milakov and Gimelshein, 2018; Liu and Abbeel, 2023), so a long sequence is attended
piece by piece, here on one device and in `nn.ring` over many. Backward runs block by block with
the log-sum-exp over *all* keys, from which the kernel recomputes the true probabilities: no merge
is needed there.

Footguns:
- Plain causal or full attention only: no mask, no packed documents, no dropout.
- Queries and keys are equally many and aligned; a cache's keys are not.
- Queries, keys and values have one head width: the fused kernels take no other.
- These are torch's own operators (`aten._scaled_dot_product_*`), which carry no promise; tests
  compare them with the public function.

Shapes: B rows, N queries, S keys, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

from xoron_core.errors import SequenceError, XoronError

_HALF = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32  # of the log-sum-exp that CUDA's memory-efficient kernel takes


class Block(NamedTuple):
    """Attention to some keys.

    Attributes:
        out: (B, H, N, d).
        lse: (B, H, N) natural log of the sum of exponentials of the scaled scores, fp32 (fp64 for
            fp64 inputs).
        seeds: what the kernel's backward takes besides; empty on a CPU.
    """

    out: Tensor
    lse: Tensor
    seeds: tuple[Tensor, ...] = ()


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Attention in chunks of queries, with memory linear in the length.

    Args:
        q: (B, H, N, d).
        k, v: (B, G, N, d) with G dividing H.
        causal: whether query n sees keys 0 .. n only.
        scale: of the scores; None is 1 / sqrt(d).
        chunk: queries per block.

    Returns:
        (B, H, N, d), the same as `F.scaled_dot_product_attention` up to rounding.

    Raises:
        SequenceError: if shapes or types do not fit.
        XoronError: on a device without a fused kernel.
    """
    q, k, v = prepare(q, k, v)
    result: Tensor = _Blockwise.apply(q, k, v, causal, scale, chunk)
    return result


def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts as autocast would and checks what the block kernels take for granted.

    Raises:
        SequenceError: if shapes or types do not fit.
        XoronError: on a device without a fused kernel.
    """
    device = q.device.type
    if device not in ("cpu", "cuda"):
        raise XoronError(
            f"block attention has kernels for cpu and cuda, got tensors on {device}; use"
            " xoron_core.nn.kernels.sdpa there"
        )
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    rows, heads, length, width = q.shape
    fits = k.shape == v.shape == (rows, k.shape[1], length, width) and heads % k.shape[1] == 0
    if not fits or not q.dtype == k.dtype == v.dtype:
        got = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for name, t in (("q", q), ("k", k), ("v", v))
        )
        raise SequenceError(
            "block attention takes q (B, H, N, d) and k, v (B, G, N, d) of one type, G dividing H,"
            f" got {got}; pad the values where their width differs"
        )
    return q, k, v


def block_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Block:
    """Attention of q (B, H, N, d) to k, v (B, G, S, d); causal needs N = S."""
    ops = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, scale=scale
        )
        return Block(out, lse)
    k, v = (_expand(t, q.shape[1]) for t in (k, v))
    if q.dtype in _HALF:
        out, lse, _, _, _, _, *seeds, _ = ops._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        out, lse, *seeds = ops._scaled_dot_product_efficient_attention.default(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
    return Block(out, lse[..., : q.shape[2]], tuple(seeds))


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: Block,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one block.

    Args:
        grad_out: (B, H, N, d) gradient of the merged result.
        q, k, v: the block's inputs.
        block: result and log-sum-exp of these queries over *all* keys, with the seeds of any of
            their blocks.
        causal, scale: as in the block's forward.
    """
    ops, lse = torch.ops.aten, block.lse.contiguous()
    if q.device.type == "cpu":
        dq, dk, dv = ops._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad_out, q, k, v, block.out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv
    groups, length = k.shape[1], q.shape[2]
    k, v = (_expand(t, q.shape[1]) for t in (k, v))
    if q.dtype in _HALF:
        lengths = (None, None, length, k.shape[2])
        dq, dk, dv = ops._scaled_dot_product_flash_attention_backward.default(
            grad_out, q, k, v, block.out, lse, *lengths, 0.0, causal, *block.seeds, scale=scale
        )
    else:
        lse = F.pad(lse, (0, -length % _LSE_ALIGNMENT), value=torch.inf)
        inputs = (grad_out, q, k, v, None, block.out, lse, *block.seeds)
        wanted = [True, True, True, False]
        dq, dk, dv, _ = ops._scaled_dot_product_efficient_attention_backward.default(
            *inputs, 0.0, wanted, causal, scale=scale
        )
    return dq, _sum_groups(dk, groups), _sum_groups(dv, groups)


def merge_(out: Tensor, lse: Tensor, block: Block) -> None:
    """Merges a block over further keys into `out` (B, H, N, d) and `lse` (B, H, N), in place.

    The new share is exp(b) / (exp(a) + exp(b)) = sigmoid(b - a): no exponential can overflow.
    """
    out.lerp_(block.out.to(out.dtype), torch.sigmoid(block.lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, block.lse, out=lse)


class _Blockwise(torch.autograd.Function):
    """Each chunk of queries attends to its own keys, then to all keys before it in one block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, chunk: int
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        seeds: tuple[Tensor, ...] = ()
        for here, key_blocks in _schedule(q.shape[2], chunk, causal):
            queries, [(own, diagonal), *past] = q[:, :, here], key_blocks
            whole, sums, seeds = block_forward(
                queries, k[:, :, own], v[:, :, own], causal=diagonal, scale=scale
            )
            for keys, _ in past:
                inputs = queries, k[:, :, keys], v[:, :, keys]
                whole = whole.to(lse.dtype)
                merge_(whole, sums, block_forward(*inputs, causal=False, scale=scale))
            out[:, :, here], lse[:, :, here] = whole, sums
        ctx.save_for_backward(q, k, v, out, lse, *seeds)
        ctx.options = causal, scale, chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *seeds = ctx.saved_tensors
        causal, scale, chunk = ctx.options
        # Sums over blocks, so in fp32.
        dq, dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (q, k, v))
        for here, key_blocks in _schedule(q.shape[2], chunk, causal):
            block = Block(out[:, :, here], lse[:, :, here], tuple(seeds))
            for keys, diagonal in key_blocks:
                part_q, part_k, part_v = block_backward(
                    grad_out[:, :, here],
                    q[:, :, here],
                    k[:, :, keys],
                    v[:, :, keys],
                    block=block,
                    causal=diagonal,
                    scale=scale,
                )
                dq[:, :, here] += part_q
                dk[:, :, keys] += part_k
                dv[:, :, keys] += part_v
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _schedule(
    length: int, chunk: int, causal: bool
) -> list[tuple[slice, list[tuple[slice, bool]]]]:
    """For each chunk of queries, its blocks of keys and whether a block is on the diagonal."""
    schedule = []
    for start in range(0, length, chunk):
        here = slice(start, min(start + chunk, length))
        keys = [(here, True)] if causal else [(slice(0, length), False)]
        if causal and start:
            keys.append((slice(0, start), False))
        schedule.append((here, keys))
    return schedule


def _expand(tensor: Tensor, heads: int) -> Tensor:
    """(B, G, S, d) to (B, H, S, d): CUDA's kernels with a log-sum-exp know no groups."""
    ratio = heads // tensor.shape[1]
    return tensor if ratio == 1 else repeat(tensor, "B G S d -> B (G R) S d", R=ratio)


def _sum_groups(tensor: Tensor, groups: int) -> Tensor:
    """The reverse of `_expand` for gradients."""
    return reduce(tensor, "B (G R) S d -> B G S d", "sum", G=groups)
