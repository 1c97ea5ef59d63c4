"""Mixture of experts: fp32 top-k router that balances itself, routed experts, a shared expert.

Positions are sorted by expert once, each expert runs on its own contiguous slice, and the results
are added back: no loop over tokens, no capacity, nothing dropped. Experts stay evenly used without
an auxiliary loss: a bias per expert takes part in the choice, not in the weights, and is moved
against the observed load after each optimizer step (Wang et al., 2024).

Footguns:
- `forward` changes nothing: it returns what it observed (`RouterStatistics`), and whoever trains
  sums that over an accumulation window and over processes, then calls `update_selection_bias` once.
  Counting in `forward` would count recomputed activations twice.
- Positions marked invalid reach no expert and count nowhere; only the shared expert sees them.
- Every expert has parameters of its own. One stacked parameter that is indexed per expert costs a
  full-size zero gradient per expert; unbinding it still copies all gradients once.
- While gradients are recorded an expert without tokens runs on an empty slice, so that its gradient
  is zero and not missing: data-parallel training waits for the gradient of every parameter.
- The router decides in fp32 also under autocast; keep weight and bias in fp32 when a model is cast
  down: in half precision small bias updates are lost.
- Statistics are fp32 sums: counts are exact up to 16,777,216.

Shapes: B rows, N positions, D width, T = B * N tokens, E experts, K chosen per token, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.nn.experts import Kernel, run_experts
from xoron_core.nn.mlp import SwiGLU

Scoring = Literal["sigmoid", "softmax"]


class Groups(NamedTuple):
    """Which kind of position is which, for statistics apart: text, image, ...

    Attributes:
        ids: (B, N) int64 in 0 .. number - 1; any of them where a position is padding.
        number: G, the same on every process and in every batch.
    """

    ids: Tensor
    number: int


class RouterStatistics(NamedTuple):
    """What one block observed in one forward pass; all sums, fp32, so that they add up.

    With groups, the first three have an axis G in front.

    Attributes:
        load: (E,) how often each expert was chosen.
        tokens: number of routed tokens.
        entropy: sum over tokens of the entropy of their normalised scores, in nats.
        balance: sum over rows of the sequence-wise balance loss, with gradient.
        rows: number of rows that hold a token.
        z: sum over tokens of the squared log-sum-exp of the router's logits, with gradient.
    """

    load: Tensor
    tokens: Tensor
    entropy: Tensor
    balance: Tensor
    rows: Tensor
    z: Tensor


class TopKRouter(nn.Module):
    """Scores each token against each expert and keeps the best K, all in fp32.

    The choice is made on score plus bias, the weights are the scores alone (DeepSeek-V3, 2024).

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, between 1 and E.
        scoring: how logits become scores: `sigmoid` each, or `softmax` over the experts.
        normalize: whether a token's K weights sum to 1 before scaling.
        scaling_factor: what the weights are multiplied with.
    """

    selection_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        scoring: Scoring = "sigmoid",
        normalize: bool = True,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.scoring = scoring
        self.normalize = normalize
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02): small logits, so that at the start every expert scores about one half."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) to logits (T, E) fp32, weights (T, K) fp32 and expert indices (T, K) int64."""
        device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        with torch.autocast(device, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        return logits, *self.choose(self.scores(logits))

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) logits to scores in 0 .. 1."""
        return logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E) scores to weights (T, K) fp32 and expert indices (T, K) int64."""
        experts = (scores.detach() + self.selection_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scaling_factor, experts

    @torch.no_grad()
    def update_selection_bias(self, load: Tensor, speed: float) -> None:
        """Moves the bias by `speed` towards experts that were used less than the mean.

        Args:
            load: (E,) choices per expert, over the whole optimizer step and all processes.
            speed: gamma, in units of a score; 0 leaves the bias as it is.
        """
        load = load.to(self.selection_bias.device, torch.float32)
        self.selection_bias += speed * (load.mean() - load).sign().to(self.selection_bias.dtype)

    def extra_repr(self) -> str:
        experts, size = self.weight.shape
        return f"{size}, num_experts={experts}, top_k={self.top_k}, scoring={self.scoring}"


class MoE(nn.Module):
    """A feed-forward block of which each token uses K of E experts and the shared one.

    Args:
        hidden_size: D.
        intermediate_size: inner width of one expert.
        num_experts: E.
        top_k: K.
        use_shared_expert: whether one more expert serves every token.
        num_shared_experts: how many experts' width the shared one has.
        scoring, normalize, scaling_factor: of the router.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        use_shared_expert: bool = True,
        num_shared_experts: int = 1,
        scoring: Scoring = "sigmoid",
        normalize: bool = True,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k=top_k,
            scoring=scoring,
            normalize=normalize,
            scaling_factor=scaling_factor,
        )
        self.experts = nn.ModuleList(
            SwiGLU(hidden_size, intermediate_size) for _ in range(num_experts)
        )
        self.shared_expert = (
            SwiGLU(hidden_size, num_shared_experts * intermediate_size)
            if use_shared_expert
            else None
        )

    @overload
    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        *,
        kernel: Kernel | None = None,
        observe: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        *,
        kernel: Kernel | None = None,
        observe: Literal[True],
        groups: Groups | None = None,
    ) -> tuple[Tensor, RouterStatistics]: ...

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        *,
        kernel: Kernel | None = None,
        observe: bool = False,
        groups: Groups | None = None,
    ) -> Tensor | tuple[Tensor, RouterStatistics]:
        """Runs each token through its experts; what it gets does not depend on other tokens.

        Args:
            x: (B, N, D).
            valid: (B, N) bool, False where a position is padding; None for all valid.
            kernel: how the experts run, see `run_experts`.
            observe: whether to return statistics too.
            groups: of positions, to observe them apart.

        Returns:
            (B, N, D), or that and the statistics.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits, weights, experts = self.router(tokens)
        chosen = (
            experts
            if valid is None
            else experts.masked_fill(~valid.reshape(-1, 1), len(self.experts))
        )
        out = run_experts(self.experts, tokens, weights=weights, chosen=chosen, kernel=kernel)
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens)
        out = out.view_as(x)
        if not observe:
            return out
        rows = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        rows = rows if valid is None else valid
        return out, self._observe(logits, chosen, rows=rows, groups=groups)

    def _observe(
        self, logits: Tensor, chosen: Tensor, *, rows: Tensor, groups: Groups | None
    ) -> RouterStatistics:
        """(T, E), (T, K) with E for padding, and the valid positions (B, N)."""
        valid, scores = rows.reshape(-1), self.router.scores(logits)
        share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        entropy = torch.special.entr(share.detach()).sum(-1) * valid
        if groups is None:
            counted = (self._load(chosen), valid.sum().float(), entropy.sum())
        else:
            # A group's padding is counted as a choice of expert E, which `_load` cuts off.
            kind = groups.ids.reshape(-1)
            zeros = entropy.new_zeros(groups.number)
            counted = (
                self._load(chosen, kind.unsqueeze(-1), groups.number),
                zeros.index_add(0, kind, valid.float()),
                zeros.index_add(0, kind, entropy),
            )
        return RouterStatistics(
            *counted,
            balance=self._balance(scores, share, rows),
            rows=rows.any(-1).sum().float(),
            z=(logits.logsumexp(-1).square() * valid).sum(),
        )

    def _load(self, chosen: Tensor, kind: Tensor | int = 0, count: int | None = None) -> Tensor:
        """(T, K) choices, and (T, 1) groups, to how often each expert is chosen, (E,) or (G, E)."""
        bins = len(self.experts) + 1
        load = torch.bincount((kind * bins + chosen).flatten(), minlength=(count or 1) * bins)
        load = load.view(-1, bins)[:, :-1].float()
        return load.squeeze(0) if count is None else load

    def _balance(self, scores: Tensor, share: Tensor, rows: Tensor) -> Tensor:
        """The sequence-wise balance loss (DeepSeek-V3, 2024, eq. 17 to 20), summed over rows.

        Per row the sum over experts of (how often it scores among the best K, over its fair
        share) times (its mean share of the scores): 1 when even, up to E / K.
        """
        num_experts, top_k = len(self.experts), self.router.top_k
        best = scores.detach().topk(top_k, dim=-1).indices
        picked = torch.zeros_like(scores).scatter_(-1, best, 1.0)
        valid = rows.unsqueeze(-1).float()
        count = valid.sum(1).clamp(min=1)  # (B, 1)
        shape = (*rows.shape, num_experts)
        frequency = (picked.view(shape) * valid).sum(1) * num_experts / (top_k * count)
        return (frequency * (share.view(shape) * valid).sum(1) / count).sum()


def balance_metrics(
    load: Tensor, tokens: Tensor, entropy: Tensor, *, top_k: int, names: Sequence[str] = ()
) -> dict[str, float]:
    """How evenly one block's experts were used.

    Args:
        load, tokens, entropy: as in `RouterStatistics`, summed over a step or several.
        top_k: K.
        names: of the G groups, if there are any.

    Returns:
        `max_load` and `min_load` over the mean load (1 is even); the mean `entropy` of a token's
        scores over its maximum ln E (1 is undecided); and `dropped`, the choices that tokens were
        due and no expert saw. Nothing has a capacity here, so that one is 0, or there is a mistake.
        With groups the same of each as `name/...`, except of those without tokens.
    """
    if load.ndim == 2:
        apart = {
            f"{name}/{key}": value
            for name, *sums in zip(names, load, tokens, entropy, strict=True)
            if sums[1] > 0
            for key, value in balance_metrics(*sums, top_k=top_k).items()
        }
        return balance_metrics(load.sum(0), tokens.sum(), entropy.sum(), top_k=top_k) | apart
    mean = load.float().mean().clamp(min=1e-9)
    most = torch.tensor(float(load.numel())).log().clamp(min=1e-9)
    return {
        "max_load": float(load.max() / mean),
        "min_load": float(load.min() / mean),
        "entropy": float(entropy / tokens.clamp(min=1)) / float(most),
        "dropped": float(top_k * tokens.double() - load.double().sum()),
    }
