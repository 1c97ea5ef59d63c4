"""Cross-entropy of a linear head without its logits matrix, and of any other head slice by slice.

A 152k vocabulary makes P x V logits by far the largest tensor of a training step, and the plain
way holds three or four of them. `linear_cross_entropy` holds one chunk of rows, and computes the
gradients of hidden states and weight from that chunk while it is there, in the forward pass: three
matrix products as in the plain way, where recomputing in the backward pass takes four.
`chunked_cross_entropy` is for heads that are more than a matrix product (soft-capping, adapters,
quantised weights): the same numbers from slices under activation recomputation.

Footguns:
- Only `sum` has a gradient; everything else of a `TokenLosses` is a measurement.
- The gradient of the weight (V, D) lives from forward to backward, so run the backward soon.
- On a CPU everything is multiplied in fp32 also under autocast: half-precision products are five
  times slower there without matrix units, and less exact.
- The weight is read directly: hooks, wrappers and sharding of the head's module are bypassed. Ask
  `is_plain_linear` first.
- A head that gathers shards on each call must not be called a data-dependent number of times:
  ranks would wait for each other for ever. Give `chunked_cross_entropy` a `chunk` of P there.

Shapes: P positions, D width, V vocabulary rows, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from xoron_core.errors import SequenceError, XoronError

# Logits of one chunk: 160 MB in fp32 on a CPU, where 256 positions of 152k rows were the fastest
# (fewer read the weight too often, more find no cache); 1 GiB on an accelerator, where every
# chunk passes once over the weight's gradient.
_CPU_ELEMENTS = 40_000_000
_DEVICE_ELEMENTS = 2**28
# The first slice of a head whose number of rows is not known yet.
_FIRST_SLICE = 256
# fp16 holds no probability below 6e-8; a gradient of at most 1 leaves room to multiply.
_FP16_SCALE = 4096.0
_HALF = (torch.float16, torch.bfloat16)


class TokenLosses(NamedTuple):
    """What a cross-entropy gives.

    Attributes:
        sum: scalar in fp32 (fp64 for fp64 inputs), nats: the weighted sum of -log p(target) and of
            the z-loss. The only part with a gradient.
        log_probs: (P,) log p(target), at most 0.
        correct: (P,) bool, whether the target has the highest logit.
        log_z: (P,) log of the softmax's denominator; z-loss is its square.
    """

    sum: Tensor
    log_probs: Tensor
    correct: Tensor
    log_z: Tensor


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's forward is the product with a local, unquantised weight and no more.

    Adapters, quantised and sharded layers are other classes or hold other tensors; offloading and
    tracing put hooks on a module or replace its `forward`.
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return not hooked and all(type(t) is nn.Parameter and t.is_floating_point() for t in tensors)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    targets: Tensor,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> TokenLosses:
    """Cross-entropy of `hidden @ weight.T + bias`, the logits never all at once.

    Equals `F.cross_entropy` on the full logits, with statistics in fp32. The gradients are those
    of hidden, weight and bias, as far as they are asked for.

    Args:
        hidden: (P, D); P may be 0.
        weight: (V, D), tied or not.
        targets: (P,) int64 in [0, V).
        bias: (V,) or None.
        weights: (P,) weight of each position, or None for 1. Without gradient.
        z_loss: coefficient of the squared log-denominator, at least 0 (PaLM, 2022: 1e-4), which
            keeps logits from drifting.
        chunk: C; None chooses by the size of V and the device.

    Returns:
        The weighted sum over positions and, per position, what was measured.

    Raises:
        SequenceError: if shapes do not fit, or (on a CPU) a target is no row.
    """
    _check(hidden, weight, targets, weights)
    if chunk is None:
        chunk = _chunk_size(len(hidden), weight.shape[0], hidden.device)
    total, log_probs, correct, log_z = _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, weights, z_loss, chunk, torch.is_grad_enabled()
    )
    return TokenLosses(total, log_probs, correct, log_z)


def chunked_cross_entropy(
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    targets: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> TokenLosses:
    """Cross-entropy of any head, called on slices and again in the backward pass.

    Args:
        hidden: (P, D); P may be 0, and then the head is still called, on no position.
        logits: (C, D) to (C, V), each position by itself.
        targets: (P,) int64 in [0, V).
        weights: (P,) weight of each position, or None for 1.
        z_loss: see `linear_cross_entropy`.
        chunk: C; None learns V from a first slice. One slice of all positions is neither cut nor
            recomputed.

    Returns:
        As `linear_cross_entropy`.
    """

    def run(hidden_CD: Tensor, targets_C: Tensor, weights_C: Tensor | None) -> TokenLosses:
        scores = logits(hidden_CD)
        rows.append(scores.shape[-1])
        return _of_scores(scores, targets_C, weights_C, z_loss)

    rows: list[int] = []
    size = len(hidden)
    first = min(size, chunk or _FIRST_SLICE)
    parts = [run(hidden[:first], targets[:first], _cut(weights, 0, first))]
    if first < size:
        # Slices of one size; a rest that is small beside them is recomputed by nobody.
        step = chunk or _chunk_size(size - first, rows[0], hidden.device)
        fits = chunk is None and step >= size - first
        for start in range(first, size, step):
            piece = slice(start, start + step)
            inputs = (hidden[piece], targets[piece], _cut(weights, start, start + step))
            if fits or not torch.is_grad_enabled():
                parts.append(run(*inputs))
            else:
                parts.append(cast(TokenLosses, checkpoint(run, *inputs, use_reentrant=False)))
    return TokenLosses(
        torch.stack([part.sum for part in parts]).sum(),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.correct for part in parts]),
        torch.cat([part.log_z for part in parts]),
    )


def _of_scores(
    scores: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float
) -> TokenLosses:
    """The plain way, on logits (C, V) that are all there."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = F.cross_entropy(scores, targets, reduction="none")
    log_probs = -losses.detach()
    if z_loss:
        log_z = scores.logsumexp(-1)
        losses = losses + z_loss * log_z.square()
    with torch.no_grad():
        picked = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        correct = scores.argmax(-1) == targets
    total = losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
    return TokenLosses(total, log_probs, correct, picked - log_probs)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in forward; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        z_loss: float,
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        # The arithmetic below casts by itself, once, what autocast would cast per chunk.
        dtype = _compute_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Gradients(hidden, weight, bias, wanted, dtype)
            log_probs, correct, log_z = grads.run(targets, weights, z_loss, chunk)
        losses = z_loss * log_z.square() - log_probs if z_loss else -log_probs
        total = losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
        ctx.grads = (grads.hidden, grads.weight, grads.bias)
        ctx.spent = False
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(log_probs, correct, log_z)
        return total, log_probs, correct, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise XoronError(
                "this loss went backward already and its gradients are gone; pass"
                " retain_graph=True to the first backward, or run the forward again"
            )
        keep = _keeps_graph()
        ctx.spent = not keep
        results: list[Tensor | None] = []
        for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True):
            if grad is None:
                results.append(None)
                continue
            # In place, unless somebody will come again: the weight's gradient is the largest
            # tensor here, and a copy of it would cost what chunking saved.
            scaled = grad * upstream if keep else grad.mul_(upstream)
            results.append(scaled.to(dtype))
        if not keep:
            ctx.grads = (None, None, None)
        return (*results, None, None, None, None, None)


class _Gradients:
    """Runs over the chunks and gathers the gradients that are wanted, None for the others."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: list[bool],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.statistics = torch.promote_types(dtype, torch.float32)
        self.hidden_PD, self.weight_VD = hidden, weight.to(dtype)
        self.bias_V = None if bias is None else bias.to(self.statistics)
        like: dict[str, Any] = {"dtype": self.statistics, "device": hidden.device}
        self.hidden = torch.empty(hidden.shape, **like) if wanted[0] else None
        self.weight = torch.empty(weight.shape, **like) if wanted[1] else None
        self.bias = torch.zeros(weight.shape[0], **like) if wanted[2] else None
        self.any = any(wanted)

    def run(
        self, targets: Tensor, weights: Tensor | None, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, correctness and log-denominators (P,)."""
        size, rows = len(targets), self.weight_VD.shape[0]
        log_probs = torch.empty(size, dtype=self.statistics, device=targets.device)
        correct, log_z = torch.empty_like(log_probs, dtype=torch.bool), torch.empty_like(log_probs)
        buffer = None
        if self.dtype == self.statistics:
            # One buffer for all chunks: fresh pages cost as much as a pass over them.
            buffer = log_probs.new_empty(min(chunk, size), rows)
        for start in range(0, size, chunk):
            piece = slice(start, min(start + chunk, size))
            hidden_CD = self.hidden_PD[piece].to(self.dtype)
            out = None if buffer is None else buffer[: len(hidden_CD)]
            scores = _product(hidden_CD, self.weight_VD.t(), out)
            if self.bias_V is not None:
                scores += self.bias_V
            log_probs[piece], correct[piece], log_z[piece], total = _exponentials(
                scores, targets[piece]
            )
            if self.any:
                scores.div_(total)
                if z_loss:
                    scores.mul_(1 + 2 * z_loss * log_z[piece, None])
                # (C, V) is now the gradient of each position's loss in its logits.
                scores.scatter_add_(1, targets[piece, None], -torch.ones_like(total))
                self._gather(piece, scores, hidden_CD, _cut(weights, piece.start, piece.stop))
        if self.weight is not None and not size:
            self.weight.zero_()
        if self.weight is not None and self.dtype == torch.float16:
            self.weight.div_(_FP16_SCALE)
        return log_probs, correct, log_z

    def _gather(
        self, piece: slice, grad_CV: Tensor, hidden_CD: Tensor, weights: Tensor | None
    ) -> None:
        """Adds one chunk's share; positions' weights go to the narrow factor of each product."""
        share = None if weights is None else weights.to(self.statistics).unsqueeze(-1)
        if self.bias is not None:
            self.bias += (grad_CV if share is None else grad_CV * share).sum(0)
        scale = _FP16_SCALE if self.dtype == torch.float16 else 1.0
        if self.dtype != self.statistics:
            grad_CV = grad_CV.mul_(scale).to(self.dtype)
        if self.hidden is not None:
            rows = _product(grad_CV, self.weight_VD, self.hidden[piece])
            if share is not None or scale != 1.0:
                rows.mul_((1.0 if share is None else share) / scale)
        if self.weight is not None:
            weighted = hidden_CD if share is None else (hidden_CD * share).to(self.dtype)
            if piece.start == 0:
                _product(grad_CV.t(), weighted, self.weight)
            elif self.dtype == self.statistics:
                self.weight.addmm_(grad_CV.t(), weighted)
            else:
                self.weight += _product(grad_CV.t(), weighted)


def _exponentials(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns logits (C, V) in place into exp(logit - maximum).

    Returns:
        Log-probabilities of the targets, correctness and log-denominators (C,), and the sums of
        what the logits have become (C, 1).
    """
    top, best = scores.max(-1, keepdim=True)
    picked = scores.gather(-1, targets.unsqueeze(-1))
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    log_total = total.log()
    # The maximum goes first: its difference to the target is exact where both are large.
    log_probs = ((picked - top) - log_total).squeeze(-1)
    return log_probs, best.squeeze(-1) == targets, (top + log_total).squeeze(-1), total


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A matrix product with fp32 (or fp64) results, also of half-precision factors."""
    if left.dtype not in _HALF:
        return torch.mm(left, right, out=out)
    result = torch.mm(left, right, out_dtype=torch.float32)
    return result if out is None else out.copy_(result)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the factors of the products are cast to."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype in _HALF and device != "cuda" else dtype


def _chunk_size(size: int, rows: int, device: torch.device) -> int:
    """C: as many positions as a buffer of logits may hold, in chunks of nearly equal size."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    most = max(1, elements // max(rows, 1))
    chunks = -(-max(size, 1) // most)
    return -(-max(size, 1) // chunks)


def _cut(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]


def _keeps_graph() -> bool:
    """Whether the running backward pass was asked to retain the graph; True where unknown."""
    if torch.compiler.is_compiling():
        return True
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    size = tuple(targets.shape)
    fits = hidden.dim() == 2 and hidden.shape[:1] == size and hidden.shape[1:] == weight.shape[1:]
    if not fits or (weights is not None and tuple(weights.shape) != size):
        got = {"hidden": hidden, "weight": weight, "targets": targets, "weights": weights}
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in got.items() if t is not None)
        raise SequenceError(
            "linear_cross_entropy takes hidden (P, D), weight (V, D), targets (P,) and weights"
            f" (P,) or None, got {shapes}; flatten rows and positions first"
        )
    # Elsewhere reading the range would wait for the device; its gather stops on its own.
    readable = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise SequenceError(
                f"targets lie in {low} .. {high}, expected 0 .. {weight.shape[0] - 1}: drop ignored"
                " positions before the call, and give the head a row for every id"
            )
