"""How tokens run through their experts: contiguous slices, or grouped matrix products.

Both sort the choices by expert once. Slices run each expert on its own rows and need their number
on the host; the grouped kernel takes offsets on the device, but stacks the weights each time.
Measured on CPU, forward and backward, 8 experts of 1024 x 2048: slices 1.00 of one matrix product
of the same FLOPs at 2,048 tokens and 1.15 at 512, grouped 1.29 and 1.61. So slices are taken on
CPU, and the grouped kernel on CUDA in half precision, where reading sizes back stalls the device;
that side of the rule is reasoned, not measured.

Footguns:
- A decoding step that is being compiled runs every expert on its few tokens: sizes that depend on
  values would break its graph. The same on the meta device, which has no values.
- `grouped_mm` leaves rows behind the last offset undefined: they are masked on both sides.
- Its strides must be multiples of 16 bytes: widths that are multiples of 8 in half precision, of 4
  in fp32. Other widths run as slices too.
- The grouped kernel reads the weights of plain layers. Where one is something else (an adapter, a
  quantised, distributed or offloaded layer) all experts run as slices, whatever was asked for.

Shapes: T tokens, D width, F inner width, E experts, K chosen per token, M = T * K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.nn.mlp import SwiGLU

Kernel = Literal["slices", "grouped"]


def run_experts(
    experts: nn.ModuleList,
    tokens: Tensor,
    *,
    weights: Tensor,
    chosen: Tensor,
    kernel: Kernel | None = None,
) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        experts: E `SwiGLU` blocks.
        tokens: (T, D).
        weights: (T, K).
        chosen: (T, K) int64 expert indices; E where a token goes to no expert.
        kernel: how to run them if their layers allow it; None decides by device and precision.

    Returns:
        (T, D).
    """
    few = torch.compiler.is_compiling() and len(tokens) <= len(experts)
    if few or tokens.is_meta:
        return _all_masked(experts, tokens, weights=weights, chosen=chosen)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts) + 1)[: len(experts)]
    if _kernel(experts, tokens, kernel) == "grouped":
        source = order // chosen.shape[1]
        nowhere = chosen.flatten().index_select(0, order).unsqueeze(-1) == len(experts)
        mixed = _grouped(experts, tokens.index_select(0, source), counts=counts, nowhere=nowhere)
    else:
        sizes = counts.tolist()
        order = order[: sum(sizes)]
        source = order // chosen.shape[1]
        mixed = _slices(experts, tokens.index_select(0, source), sizes=sizes)
    shares = weights.flatten().index_select(0, order).unsqueeze(-1)
    mixed = mixed * shares.to(mixed.dtype)
    return torch.zeros_like(tokens, dtype=mixed.dtype).index_add(0, source, mixed)


def _kernel(experts: nn.ModuleList, tokens: Tensor, wanted: Kernel | None) -> Kernel:
    if wanted == "slices" or (wanted is None and not tokens.is_cuda):
        return "slices"  # before every layer is looked at: this runs for each decoded token
    layers = [layer for expert in experts for layer in expert.children()]
    weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
    # Quantised and distributed weights are parameters of a class of their own; offloaded ones are
    # on the meta device except while their own layer runs.
    plain = len(weights) == len(layers) and all(
        type(weight) is nn.Parameter and weight.device == tokens.device for weight in weights
    )
    if not plain:
        return "slices"
    size = weights[0].element_size()
    if any(side * size % 16 for side in weights[0].shape):
        return "slices"
    return wanted or ("grouped" if size == 2 else "slices")


def _all_masked(
    experts: nn.ModuleList, tokens: Tensor, *, weights: Tensor, chosen: Tensor
) -> Tensor:
    """Every expert on every token: more work, but no shape depends on values."""
    shares = [(weights * (chosen == index)).sum(-1, keepdim=True) for index in range(len(experts))]
    outputs = [
        expert(tokens) * share.to(tokens.dtype)
        for expert, share in zip(experts, shares, strict=True)
    ]
    return torch.stack(outputs).sum(0)


def _slices(experts: nn.ModuleList, ordered: Tensor, *, sizes: Sequence[int]) -> Tensor:
    """(M, D) sorted by expert to (M, D)."""
    run_empty = torch.is_grad_enabled() or not len(ordered)
    return torch.cat(
        [
            expert(part)
            for expert, part in zip(experts, ordered.split(list(sizes)), strict=True)
            if run_empty or part.shape[0]
        ]
    )


def _grouped(experts: nn.ModuleList, ordered: Tensor, *, counts: Tensor, nowhere: Tensor) -> Tensor:
    """(M, D) sorted by expert, the unrouted (M, 1) last, to (M, D) with zeros for those."""
    blocks = [cast(SwiGLU, expert) for expert in experts]
    ends = counts.cumsum(0).to(torch.int32)
    gate = torch.stack([block.gate_proj.weight for block in blocks]).mT
    up = torch.stack([block.up_proj.weight for block in blocks]).mT
    down = torch.stack([block.down_proj.weight for block in blocks]).mT
    x = ordered.to(gate.dtype).masked_fill(nowhere, 0)
    inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    return F.grouped_mm(inner.masked_fill(nowhere, 0), down, offs=ends).masked_fill(nowhere, 0)
