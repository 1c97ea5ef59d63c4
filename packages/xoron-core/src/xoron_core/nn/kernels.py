"""Attention kernels behind one call; `kernel_choice` says which of them a forward pass takes.

Footguns:
- `blockwise` keeps nothing apart: no padding on the left or inside, no packed documents.
- FlexAttention on a CPU has no backward and makes all scores: for tests.
- Queries, keys and values have one width, except for `eager` and `flex`.
- SDPA's `is_causal` aligns upper left: it is wrong as soon as there are cached keys.
- In half precision a score may exceed 65,504 before it is scaled. Fused kernels hold scores in
  fp32; where their product is a tensor the scale is split between its factors.

Shapes: B rows, N queries, S keys, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from xoron_core.nn import masks
from xoron_core.nn.blockwise import blockwise_attention

HALF = (torch.float16, torch.bfloat16)


class Kernel(Protocol):
    """Scaled dot-product attention with grouped heads."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Any = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            q: (B, H, N, d).
            k, v: (B, G, S, d) with G dividing H.
            mask: in the form that the kernel takes; dense is (B or 1, 1, N, S), bool (True may
                look) or additive. None is no mask.
            causal: without a mask, whether query n sees keys 0 .. n only; a single query sees all.
            scale: of the scores, positive; None is 1 / sqrt(d).

        Returns:
            (B, H, N, d).
        """
        ...


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's fused attention, kept off the slow math kernel; see `Kernel`."""
    groups = q.shape[1] // k.shape[1]
    is_causal = causal and mask is None and q.shape[2] > 1
    half = q.dtype in HALF
    if groups == 1 or q.device.type == "cpu" or (half and mask is None and q.shape[2] > 1):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
        )
    if q.shape[2] == 1:
        # One query per head: the heads of a group are the queries of its key-value head.
        packed = rearrange(q, "B (G R) 1 d -> B G R d", R=groups)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
        return rearrange(out, "B G R d -> B (G R) 1 d")
    # On CUDA, grouped heads fall back to the math kernel with a mask and in fp32.
    k, v = (_all_heads(t, q) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention as it is written in papers; see `Kernel`."""
    # Half of the scale to each factor: their product is a tensor and must not overflow.
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scores = (q * root) @ (_all_heads(k, q) * root).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None and causal and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        allows = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if allows else scores + mask
    return scores.softmax(-1).to(v.dtype) @ _all_heads(v, q)


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Chunks of 4,096 queries with memory linear in the length; see `Kernel`."""
    return blockwise_attention(q, k, v, causal=causal, scale=scale)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockMask | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's FlexAttention over the blocks that are not empty; see `Kernel`."""
    if mask is None and causal:
        mask = masks.block_mask(q.shape[2], device=q.device)
    width, ratio = v.shape[-1], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Limits of its CUDA kernels: widths from 16, and for short rows 2, 4, 8, ... heads to a group.
    q, k, v = (F.pad(t, (0, max(0, 16 - t.shape[-1]))) for t in (q, k, v))
    if ratio & (ratio - 1):
        k, v = _all_heads(k, q), _all_heads(v, q)
    fused = q.device.type == "cuda" and not torch.compiler.is_compiling()
    function: Any = _compiled_flex() if fused else flex_attention
    grouped = q.shape[1] != k.shape[1]
    out = function(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return cast(Tensor, out[..., :width])


@functools.cache
def flex_is_fused() -> bool:
    """Whether FlexAttention can be compiled for this machine's CUDA device."""
    return bool(has_triton())


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _all_heads(tensor: Tensor, q: Tensor) -> Tensor:
    """(B, G, S, d) to (B, H, S, d)."""
    ratio = q.shape[1] // tensor.shape[1]
    return tensor if ratio == 1 else repeat(tensor, "B G S d -> B (G R) S d", R=ratio)
