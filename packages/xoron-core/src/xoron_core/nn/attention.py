"""Grouped-query attention with rotary positions and a key-value cache, over any kernel.

Footguns:
- Kernel and mask are chosen once per forward (`kernel_choice.choose`) and shared by all layers. No
  mask means plain causal attention where queries and keys are equally many, else every key.
- The cache is transformers': `cache.update(keys, values, layer_idx)` returns all keys so far.

Shapes: B rows, N queries, S keys, D width, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn

from xoron_core.nn.kernels import Kernel, sdpa
from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import apply_rotary


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
        mask: Any = None,
        cache: Any = None,
        kernel: Kernel = sdpa,
    ) -> Tensor:
        """Attends and projects back.

        Args:
            x: (B, N, D).
            rope: cosine and sine tables (B or 1, N, d) of these positions.
            mask: in the form that the kernel takes, or None; see `kernels.Kernel`.
            cache: a transformers `Cache` that is extended by these positions, or None.
            kernel: what attends.

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
        out = kernel(q, k, v, mask=mask, causal=True)
        return cast(Tensor, self.o_proj(rearrange(out, "B H N d -> B N (H d)")))
