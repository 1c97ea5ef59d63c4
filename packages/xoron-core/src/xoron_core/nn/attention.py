"""Grouped-query attention with rotary positions and a key-value cache, over torch's SDPA.

Footguns:
- The mask is made once per forward (`masks.causal_mask`) and shared by all layers. None means
  plain causal attention where queries and keys are equally many, else every key.
- The cache is transformers': `cache.update(keys, values, layer_idx)` returns all keys so far.
- SDPA's `is_causal` aligns upper left: it is wrong as soon as there are cached keys.

Shapes: B rows, N queries, S keys, D width, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import apply_rotary


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped heads, kept off the slow math kernel.

    Args:
        q: (B, H, N, d).
        k, v: (B, G, S, d) with G dividing H.
        mask: (B or 1, 1, N, S), bool (True may look) or additive, or None.
        causal: without a mask, whether query n sees keys 0 .. n only.
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        (B, H, N, d).
    """
    groups = q.shape[1] // k.shape[1]
    is_causal = causal and mask is None and q.shape[2] > 1
    half = q.dtype in (torch.float16, torch.bfloat16)
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
    k, v = (repeat(t, "B G S d -> B (G R) S d", R=groups) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: G, dividing H; None is H.
        head_dim: d; None is D / H.
        layer_idx: index of this layer in the cache.
        qk_norm_eps: epsilon of an RMSNorm on each head's queries and keys; None leaves them out.
        bias: whether the projections of queries, keys and values have biases.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        qk_norm_eps: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        has_norm = qk_norm_eps is not None
        self.q_norm = RMSNorm(self.head_dim, cast(float, qk_norm_eps)) if has_norm else None
        self.k_norm = RMSNorm(self.head_dim, cast(float, qk_norm_eps)) if has_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Attends and projects back.

        Args:
            x: (B, N, D).
            rope: cosine and sine tables (B or 1, N, d) of these positions.
            mask: (B or 1, 1, N, S) as `masks.causal_mask` makes it.
            cache: a transformers `Cache` that is extended by these positions, or None.

        Returns:
            (B, N, D).
        """
        q, k, v = (
            rearrange(proj(x), "B N (H d) -> B H N d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out = attend(q, k, v, mask=mask, causal=True)
        return cast(Tensor, self.o_proj(rearrange(out, "B H N d -> B N (H d)")))
