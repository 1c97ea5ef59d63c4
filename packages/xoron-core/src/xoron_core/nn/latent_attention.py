"""Multi-head latent attention: keys and values from one small latent, which is all that is cached.

A position is projected to a latent of r numbers and one rotary key that all heads share. The cache
keeps both as one contiguous row of r + d_rope numbers. Many queries (training, prefill) expand the
rows to keys and values of every head and use any kernel; few queries over a cache absorb the
expansion into the query and the output instead, over SDPA, so that decoding reads each row once.

Footguns:
- The absorbed and the expanded form are equal in exact arithmetic, not bit for bit.
- SDPA falls back to its slow math kernel, silently, where queries and values differ in width:
  the narrower side is padded here. Choose d_nope + d_rope = d_v and nothing is padded.
- The cache is transformers': its `keys` are the rows, its `values` have width zero.
- Absorption reads the weight of `kv_b_proj`. Where that is no plain Linear (an adapter, a quantised
  layer) the weight is obtained by running the layer on the unit matrix.

Shapes: B rows, N queries, S keys, D width, H heads, r latent rank, n = d_nope, p = d_rope, v = d_v.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xoron_core.nn.kernels import Kernel, sdpa
from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import apply_rotary

# Of the norms inside the projections, fixed as in the published model.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal self-attention over latents (DeepSeek-V2, 2024), with DeepSeek-V3's weight names.

    Args:
        hidden_size: D.
        num_heads: H.
        kv_lora_rank: r.
        qk_nope_head_dim: n, width of a head's query and key without position.
        qk_rope_head_dim: p, width of the rotated part, even; its key is shared by all heads.
        v_head_dim: v, width of a head's value.
        q_lora_rank: rank of the queries' own latent; None projects them directly.
        layer_idx: index of this layer in the cache.
        logit_factor: what scores are multiplied with beside 1 / sqrt(n + p).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        layer_idx: int = 0,
        logit_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.layer_idx = num_heads, layer_idx
        self.rank, self.nope, self.rope = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim
        self.value = v_head_dim
        width = qk_nope_head_dim + qk_rope_head_dim
        self.scale = logit_factor * width**-0.5
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * width, bias=False)
        self.has_q_latent = q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, num_heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(num_heads * self.value, hidden_size, bias=False)

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
            rope: cosine and sine tables (B or 1, N, p) of these positions.
            mask: in the form that the kernel takes, or None; see `kernels.Kernel`. Over a cache
                it is dense.
            cache: a transformers `Cache` that is extended by these positions, or None.
            kernel: what attends to expanded rows.

        Returns:
            (B, N, D).
        """
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.has_q_latent else None
        q = rearrange(self.q_proj(x) if q is None else q, "B N (H w) -> B H N w", H=self.num_heads)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        q_rope = apply_rotary(q_rope, *rope)
        rows = self._rows(x, rope)
        length = rows.shape[1]
        if cache is not None:
            nothing = rows.new_empty(*rows.shape[:2], 0)
            held, _ = cache.update(rows.unsqueeze(1), nothing.unsqueeze(1), self.layer_idx)
            rows = held.squeeze(1)
        few = length * (2 * self.rank - self.nope - self.value) < self.rank * (
            self.nope + self.value
        )
        if few and rows.shape[1] > length:
            out = self.absorbed(q_nope, q_rope, rows, mask=mask)
        else:
            out = self.expanded(q_nope, q_rope, rows, mask=mask, kernel=kernel)
        return cast(Tensor, self.o_proj(rearrange(out, "B H N v -> B N (H v)")))

    def _rows(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) to what the cache holds, (B, N, r + p): latent and rotated key."""
        latent, key = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        key = apply_rotary(key.unsqueeze(1), *rope).squeeze(1)
        return torch.cat((self.kv_a_layernorm(latent), key), dim=-1)

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        rows: Tensor,
        *,
        mask: Any = None,
        kernel: Kernel = sdpa,
    ) -> Tensor:
        """Attention over keys and values of every head.

        Args:
            q_nope, q_rope: (B, H, N, n) and (B, H, N, p), the latter rotated.
            rows: (B, S, r + p).
            mask: in the form that the kernel takes; None is causal where N > 1, else every key.
            kernel: what attends.

        Returns:
            (B, H, N, v).
        """
        latent, key = rows.split((self.rank, self.rope), dim=-1)
        both = rearrange(self.kv_b_proj(latent), "B S (H w) -> B H S w", H=self.num_heads)
        k_nope, v = both.split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, key.unsqueeze(1).expand(-1, self.num_heads, -1, -1)), dim=-1)
        wider = max(q.shape[-1], self.value)
        q, k, v = (
            F.pad(t, (0, wider - t.shape[-1])) if t.shape[-1] < wider else t for t in (q, k, v)
        )
        out = kernel(q, k, v, mask=mask, causal=True, scale=self.scale)
        return out[..., : self.value]

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """The same without making keys and values, with a dense mask; otherwise as `expanded`.

        A score is q_nope . (W_k latent) = (W_k' q_nope) . latent, and the heads' values are
        W_v (weights . latents): all heads attend as if they were queries of one head. The rows
        serve as values too, and what comes of their rotated part is dropped: with a slice of other
        width the flash kernel would not run. Queries are scaled first: W_k' q_nope is a tensor of
        the model's type and would be the first thing to overflow in fp16.
        """
        q_nope, q_rope = q_nope * self.scale, q_rope * self.scale
        up = rearrange(self._kv_b_weight(rows), "(H w) r -> H w r", H=self.num_heads)
        to_key, to_value = up.split((self.nope, self.value), dim=1)
        q = torch.cat((torch.einsum("bhnd,hdr->bhnr", q_nope, to_key), q_rope), dim=-1)
        length = q.shape[2]
        if mask is not None and length > 1:
            mask = mask.repeat(1, 1, self.num_heads, 1)
        elif mask is not None:
            mask = mask.expand(-1, -1, self.num_heads, -1)
        keys = rows.unsqueeze(1)
        packed = rearrange(q, "B H N w -> B 1 (H N) w")
        mixed = sdpa(packed, keys, keys, mask=mask, scale=1.0)[..., : self.rank]
        mixed = rearrange(mixed, "B 1 (H N) r -> B H N r", N=length)
        return torch.einsum("bhnr,hvr->bhnv", mixed, to_value)

    def _kv_b_weight(self, like: Tensor) -> Tensor:
        """(H (n + v), r): the weight of `kv_b_proj`, whatever stands in its place."""
        layer = self.kv_b_proj
        if type(layer) is nn.Linear:
            if hasattr(layer.weight, "to_local"):  # split by heads: those of this process
                return cast(Tensor, layer.weight.to_local())
            # A quantised weight is of another class; an offloaded one is there only in a call.
            if type(layer.weight) is nn.Parameter and not layer.weight.is_meta:
                return layer.weight
        unit = torch.eye(self.rank, dtype=like.dtype, device=like.device)
        return cast(Tensor, layer(unit).mT)
