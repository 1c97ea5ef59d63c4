"""Transformer blocks over one or several streams that attend to each other jointly.

Each stream has its own norms, projections and feed-forward; the softmax runs over the positions of
all of them ("dual stream" with two: Esser et al. 2024, "Scaling Rectified Flow Transformers"). With
one stream this is a plain pre-norm encoder block, equal to
`torch.nn.TransformerEncoderLayer(norm_first=True, activation="gelu")`.

Footguns:
- Not causal. Keys that a mask hides change nothing; rows of hidden positions mean nothing.
- In the last block of a stack, streams that nobody reads afterwards get no gradient in what would
  write them: give `num_written`, and they have keys and values only.

Shapes: B rows, N positions of a stream, S positions of all streams, D width, H heads, d per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xoron_core.nn.kernels import sdpa
from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import apply_rotary

Rope = tuple[Tensor, Tensor]


class Stream(nn.Module):
    """What one stream has of its own in a block.

    Args:
        hidden_size: D.
        num_heads: H, dividing D.
        mlp_ratio: inner width of the feed-forward over D.
        qk_norm_eps: epsilon of an RMSNorm on each head's queries and keys; None leaves them out.
        norm_eps: epsilon of the layer norms.
        written: whether the stream goes on; else it has keys and values only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm_eps: float | None = None,
        norm_eps: float = 1e-5,
        written: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.written = written
        has_norm = qk_norm_eps is not None
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.k_norm = RMSNorm(self.head_dim, cast(float, qk_norm_eps)) if has_norm else None
        if not written:
            return
        inner = int(mlp_ratio * hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = RMSNorm(self.head_dim, cast(float, qk_norm_eps)) if has_norm else None
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """(B, N, D) to queries (None if not written), keys and values, each (B, H, N, d)."""
        x = self.norm1(x)
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        k = k if self.k_norm is None else self.k_norm(k)
        k = k if rope is None else apply_rotary(k, *rope)
        if not self.written:
            return None, k, v
        q = self._heads(self.q_proj(x))
        q = q if self.q_norm is None else self.q_norm(q)
        return (q if rope is None else apply_rotary(q, *rope)), k, v

    def write(self, x: Tensor, attended: Tensor) -> Tensor:
        """(B, N, D) and what its queries found, (B, H, N, d), to the stream behind the block."""
        x = x + self.o_proj(rearrange(attended, "B H N d -> B N (H d)"))
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B N (H d) -> B H N d", d=self.head_dim)


class JointBlock(nn.Module):
    """One block over several streams of one width.

    Args:
        hidden_size: D of every stream.
        num_heads: H.
        num_streams: how many streams come in.
        num_written: how many of them, the first ones, go on; None is all.
        mlp_ratio: inner width of the feed-forwards over D.
        qk_norm_eps: epsilon of an RMSNorm on each head's queries and keys; None leaves them out.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_streams: int = 2,
        num_written: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm_eps: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_written = num_streams if num_written is None else num_written
        self.streams = nn.ModuleList(
            Stream(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                qk_norm_eps=qk_norm_eps,
                norm_eps=norm_eps,
                written=index < num_written,
            )
            for index in range(num_streams)
        )

    def forward(
        self,
        *streams: Tensor,
        ropes: Sequence[Rope | None] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Lets the streams attend to each other.

        Args:
            *streams: each (B, N, D), of any lengths.
            ropes: tables (B or 1, N, d) for each stream, or None for one without positions.
            mask: (B, S) bool over all streams' positions in order, True where valid, or None. At
                least one position of a row must be valid.

        Returns:
            The streams that go on, each (B, N, D).
        """
        members = [cast(Stream, member) for member in self.streams]
        tables = ropes or [None] * len(streams)
        made = [
            member.project(x, rope)
            for member, x, rope in zip(members, streams, tables, strict=True)
        ]
        queries = [q for q, _, _ in made if q is not None]
        keys = torch.cat([k for _, k, _ in made], dim=2)
        values = torch.cat([v for _, _, v in made], dim=2)
        where = None if mask is None else rearrange(mask, "B S -> B 1 1 S")
        found = sdpa(torch.cat(queries, dim=2), keys, values, mask=where)
        parts = found.split([q.shape[2] for q in queries], dim=2)
        return tuple(
            member.write(x, part) for member, x, part in zip(members, streams, parts, strict=False)
        )
