"""Cross-attention of a sequence on other features, as a residual that starts at exactly zero.

Footguns:
- Keys and values are made apart (`keys_values`), once for as many calls as read them.
- A query that may look at nothing gets exactly zero: attention kernels differ there (zero, mean or
  NaN), so it looks at everything and the result is dropped.
- Features have no positions here; whoever makes them puts positions into them.

Shapes: B rows, N queries, S features, D width, E feature width, H heads, d per head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from xoron_core.nn.kernels import sdpa
from xoron_core.nn.norms import RMSNorm


class CrossAttention(nn.Module):
    """Pre-norm multi-head cross-attention without biases (Vaswani et al. 2017).

    The output projection starts at zero, so a residual stream that adds this block is unchanged
    until it is trained, as with the zero-initialised gates of Flamingo (Alayrac et al. 2022).

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: d; None is D / H.
        feature_size: E; None is D.
        norm_eps: epsilon of the norms on queries' inputs and on features.
        initializer_range: standard deviation of the query, key and value projections.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        feature_size: int | None = None,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or hidden_size // num_heads
        inner, features = num_heads * self.head_dim, feature_size or hidden_size
        self.q_norm = RMSNorm(hidden_size, norm_eps)
        self.kv_norm = RMSNorm(features, norm_eps)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(features, inner, bias=False)
        self.v_proj = nn.Linear(features, inner, bias=False)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=initializer_range)
        nn.init.zeros_(self.o_proj.weight)

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) features to keys and values, each (B, S, H d)."""
        normed = self.kv_norm(features)
        return self.k_proj(normed), self.v_proj(normed)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, *, visible: Tensor | None = None
    ) -> Tensor:
        """Attends; the caller adds the result to its stream.

        Args:
            x: (B, N, D).
            keys, values: (B, S, H d) each, as `keys_values` gives them.
            visible: (B, N, S) bool, True where a query may look, or None for everywhere.

        Returns:
            (B, N, D), zero where a query may look at nothing.
        """
        q, k, v = (
            rearrange(t, "B L (H d) -> B H L d", d=self.head_dim)
            for t in (self.q_proj(self.q_norm(x)), keys, values)
        )
        if visible is None:
            out = sdpa(q, k, v)
        else:
            sees = visible.any(-1, keepdim=True)
            out = sdpa(q, k, v, mask=(visible | ~sees).unsqueeze(1))
        out = self.o_proj(rearrange(out, "B H N d -> B N (H d)"))
        return out if visible is None else torch.where(sees, out, 0)
