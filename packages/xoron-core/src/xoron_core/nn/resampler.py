"""Perceiver resamplers: any number of features to a fixed number of latents.

Two published forms (Jaegle et al. 2021, "Perceiver"; Alayrac et al. 2022, "Flamingo"):
- `PerceiverResampler`: latents attend to [context, latents], RMSNorm, gated feed-forward, as in
  Idefics2 (Laurençon et al. 2024);
- `CrossAttentionResampler`: latents attend to the context alone, which is projected but not
  normalised; layer norms with biases, no final norm, as in the Qwen3-VLM connector.

A shorter prefix of the latents may be asked for. In the second form a latent sees no other, in the
first with `nested=True` only those before it: then the prefix of a full run and a run of the prefix
are the same numbers (nested budgets; Hu et al. 2024, "Matryoshka Query Transformer").

Footgun: a row must have at least one valid feature.

Shapes: B rows, L features of a row, E their width, K latents, D their width, H heads, d per head.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from xoron_core.nn.kernels import sdpa
from xoron_core.nn.mlp import SwiGLU
from xoron_core.nn.norms import RMSNorm


class PerceiverLayer(nn.Module):
    """Latents attend to [context, latents], then a gated feed-forward; both pre-norm.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: d.
        num_kv_heads: of keys and values, dividing H; None is H.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int,
        num_kv_heads: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        groups = num_kv_heads or num_heads
        self.head_dim = head_dim
        self.latents_norm = RMSNorm(hidden_size, norm_eps)
        self.context_norm = RMSNorm(hidden_size, norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, groups * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, groups * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.mlp_norm = RMSNorm(hidden_size, norm_eps)
        self.mlp = SwiGLU(hidden_size, 4 * hidden_size)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """(B, K, D) and (B, L, D) to (B, K, D); mask (B or 1, 1, 1 or K, L + K)."""
        queries = self.latents_norm(latents)
        both = torch.cat((self.context_norm(context), queries), dim=1)
        q, k, v = (
            rearrange(t, "B N (H d) -> B H N d", d=self.head_dim)
            for t in (self.q_proj(queries), self.k_proj(both), self.v_proj(both))
        )
        found = sdpa(q, k, v, mask=mask)
        latents = latents + self.o_proj(rearrange(found, "B H K d -> B K (H d)"))
        return latents + cast(Tensor, self.mlp(self.mlp_norm(latents)))


class PerceiverResampler(nn.Module):
    """The general form.

    Args:
        input_size: E; projected to D where they differ.
        hidden_size: D.
        num_latents: K.
        num_layers: how many layers.
        num_heads: H.
        head_dim: d; None is D / H.
        num_kv_heads: of keys and values, dividing H; None is H.
        nested: whether a latent sees only itself and those before it.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_latents: int,
        num_layers: int,
        num_heads: int,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        nested: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.nested = nested
        same = input_size == hidden_size
        self.input_proj = nn.Identity() if same else nn.Linear(input_size, hidden_size)
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size) * hidden_size**-0.5)
        self.layers = nn.ModuleList(
            PerceiverLayer(
                hidden_size,
                num_heads,
                head_dim=head_dim or hidden_size // num_heads,
                num_kv_heads=num_kv_heads,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_eps)

    def forward(
        self, context: Tensor, mask: Tensor | None = None, *, num_latents: int | None = None
    ) -> Tensor:
        """Resamples.

        Args:
            context: (B, L, E).
            mask: (B, L) bool, True where valid, or None.
            num_latents: how many of the first latents to run; None is K.

        Returns:
            (B, K, D).
        """
        chosen = self.latents[:num_latents]
        latents = repeat(chosen, "K D -> B K D", B=len(context))
        seen = self._mask(mask, len(chosen), context)
        context = self.input_proj(context)
        for layer in self.layers:
            latents = layer(latents, context, seen)
        return cast(Tensor, self.norm(latents))

    def _mask(self, mask: Tensor | None, count: int, context: Tensor) -> Tensor | None:
        if mask is None and not self.nested:
            return None
        if mask is None:
            mask = context.new_ones(1, context.shape[1], dtype=torch.bool)
        each = mask.new_ones(count, count)
        each = each.tril() if self.nested else each
        rows = len(mask)
        return torch.cat(
            (
                repeat(mask, "B L -> B 1 K L", K=count),
                repeat(each, "K J -> B 1 K J", B=rows),
            ),
            dim=-1,
        )


class CrossAttentionLayer(nn.Module):
    """Latents attend to a context that is not normalised; everything has biases.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: d.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, inner)
        self.k_proj = nn.Linear(hidden_size, inner)
        self.v_proj = nn.Linear(hidden_size, inner)
        self.o_proj = nn.Linear(inner, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """(B, K, D) and (B, L, D) to (B, K, D); mask (B, 1, 1, L)."""
        q, k, v = (
            rearrange(t, "B N (H d) -> B H N d", d=self.head_dim)
            for t in (self.q_proj(self.norm1(latents)), self.k_proj(context), self.v_proj(context))
        )
        found = sdpa(q, k, v, mask=mask)
        latents = latents + self.o_proj(rearrange(found, "B H K d -> B K (H d)"))
        return latents + cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm2(latents)))))


class CrossAttentionResampler(nn.Module):
    """The form of the published Qwen3-VLM connector (6,927,872 parameters at its sizes).

    Args:
        input_size: E, always projected to D.
        hidden_size: D.
        num_latents: K.
        num_layers: how many layers.
        num_heads: H.
        head_dim: d.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_latents: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_size, hidden_size)
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size) * hidden_size**-0.5)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(hidden_size, num_heads, head_dim=head_dim)
            for _ in range(num_layers)
        )

    def forward(
        self, context: Tensor, mask: Tensor | None = None, *, num_latents: int | None = None
    ) -> Tensor:
        """Resamples; see `PerceiverResampler.forward`."""
        latents = repeat(self.latents[:num_latents], "K D -> B K D", B=len(context))
        context = self.input_proj(context)
        seen = None if mask is None else rearrange(mask, "B L -> B 1 1 L")
        for layer in self.layers:
            latents = layer(latents, context, seen)
        return latents
