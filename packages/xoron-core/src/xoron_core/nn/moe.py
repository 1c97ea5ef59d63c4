"""Mixture of experts: fp32 top-k router, routed experts over contiguous slices, a shared expert.

Positions are sorted by expert once, each expert runs on its own contiguous slice, and the results
are added back: no loop over tokens, no capacity, nothing dropped.

Footguns:
- Every expert has parameters of its own. One stacked parameter that is indexed per expert costs a
  full-size zero gradient per expert; unbinding it still copies all gradients once.
- While gradients are recorded an expert without tokens runs on an empty slice, so that its gradient
  is zero and not missing: data-parallel training waits for the gradient of every parameter.
- The router decides in fp32 also under autocast; keep its weight in fp32 when a model is cast down.

Shapes: B rows, N positions, D width, T = B * N tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.nn.mlp import SwiGLU


class TopKRouter(nn.Module):
    """Scores each token against each expert and keeps the best K, all in fp32.

    Sigmoid scores, normalised over the chosen ones (DeepSeek-V3, 2024).

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, between 1 and E.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02): small logits, so that at the start every expert scores about one half."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) to weights (T, K) fp32 that sum to 1 and expert indices (T, K) int64."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        weights, experts = scores.topk(self.top_k, dim=-1)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), experts

    def extra_repr(self) -> str:
        experts, size = self.weight.shape
        return f"{size}, num_experts={experts}, top_k={self.top_k}"


class MoE(nn.Module):
    """A feed-forward block of which each token uses K of E experts and the shared one.

    Args:
        hidden_size: D.
        intermediate_size: inner width of one expert.
        num_experts: E.
        top_k: K.
        use_shared_expert: whether one more expert serves every token.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        use_shared_expert: bool = True,
    ) -> None:
        super().__init__()
        self.router = TopKRouter(hidden_size, num_experts, top_k=top_k)
        self.experts = nn.ModuleList(
            SwiGLU(hidden_size, intermediate_size) for _ in range(num_experts)
        )
        self.shared_expert = SwiGLU(hidden_size, intermediate_size) if use_shared_expert else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D). What a token gets does not depend on the other tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(tokens)
        out = self._routed(tokens, weights, experts)
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens)
        return out.view_as(x)

    def _routed(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) to the weighted sum (T, D) of each token's experts."""
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        source = order // experts.shape[1]
        counts = torch.bincount(chosen, minlength=len(self.experts)).tolist()
        slices = tokens.index_select(0, source).split(counts)
        run_empty = torch.is_grad_enabled() or not len(tokens)
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, slices, strict=True)
            if run_empty or part.shape[0]
        ]
        shares = weights.flatten().index_select(0, order).unsqueeze(-1)
        mixed = torch.cat(outputs) * shares.to(outputs[0].dtype)
        return torch.zeros_like(tokens, dtype=mixed.dtype).index_add(0, source, mixed)
