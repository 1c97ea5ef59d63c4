"""Vector quantisation: each vector becomes the nearest one of a learned codebook, and its number.

    VectorQuantizer     (..., D) -> nearest code (..., D), index (...)
                        codes follow the mean of the vectors that chose them (van den Oord et al.
                        2017, "Neural Discrete Representation Learning", appendix A.1); codes that
                        hardly anything chooses start again from inputs (Dhariwal et al. 2020)
    ResidualQuantizer   several, each on what those before it left over (Zeghidour et al. 2021,
                        "SoundStream")

Footguns:
- `forward` changes nothing. In training it returns `statistics`, sums that add up over
  micro-batches and processes; call `update` with their total once per optimizer step, or nothing
  is learned.
- The codebook is buffers in fp32: name the quantiser in `Part.keep_fp32`. Distances are fp32 also
  under autocast.
- A new codebook knows nothing of the inputs. All of its codes count as unused and restart from
  inputs within the first steps of training, some dozens a step.

Shapes: (..., D) any leading axes, N vectors, C codes, S slots for candidates, Q codebooks, M items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xoron_core.errors import ConfigError
from xoron_core.nn.quantize_candidates import draw_candidates, lone_candidates

# Distances to all codes at once of so many vectors and codes (1 GiB in fp32).
_MOST_DISTANCES = 2**28
_SMOOTHING = 1e-5


class Quantized(NamedTuple):
    """What a quantiser makes of its input.

    Attributes:
        values: (..., D) in the input's dtype; the gradient passes straight through.
        indices: (...) int64, or (..., Q) of a residual quantiser, -1 where a codebook was dropped.
        commitment: (...) fp32, the weighted mean squared distance of each vector from its code,
            with gradient to the input.
        statistics: name to sums, for `update`; none outside training.
    """

    values: Tensor
    indices: Tensor
    commitment: Tensor
    statistics: Mapping[str, Tensor]


class VectorQuantizer(nn.Module):
    """One codebook that follows its inputs by moving averages.

    Args:
        num_codes: C.
        dim: D.
        decay: of the moving averages, per optimizer step.
        commitment: weight of the distance that draws inputs to their codes.
        restart_below: a code restarts once it is chosen less often than this share of what an even
            use would give it; 0 never restarts any.
        num_candidates: S, slots for inputs that codes may restart from; about an eighth of them
            hold one after a step.

    Raises:
        ConfigError: for sizes below 1, or a decay outside 0 .. 1.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_below: float = 0.03,
        num_candidates: int = 256,
    ) -> None:
        super().__init__()
        if min(num_codes, dim, num_candidates) < 1 or not 0 <= decay < 1:
            raise ConfigError(
                f"vector quantiser: {num_codes} codes of {dim} numbers, {num_candidates}"
                f" candidates, decay {decay}; expected at least 1 of each, and a decay from 0 to"
                " below 1"
            )
        self.num_codes, self.dim, self.decay = num_codes, dim, decay
        self.commitment, self.restart_below = commitment, restart_below
        self.num_candidates = num_candidates
        self.register_buffer("codebook", torch.randn(num_codes, dim) * dim**-0.5)
        # Moving averages of a step's counts and sums; sums / counts is the codebook.
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))

    def forward(self, z: Tensor, *, mask: Tensor | None = None) -> Quantized:
        """Finds the nearest codes.

        Args:
            z: (..., D).
            mask: (...) bool, False for padding, which is quantised but not counted; None has none.
        """
        with torch.autocast(z.device.type, enabled=False):
            inputs = z.float()
            indices = self.nearest(inputs.detach())
            codes = self.lookup(indices)
            distance = (inputs - codes).square().mean(-1)
            statistics = self._observe(inputs.detach(), indices, mask) if self.training else {}
            values = inputs + (codes - inputs).detach()
        return Quantized(values.to(z.dtype), indices, self.commitment * distance, statistics)

    def nearest(self, z: Tensor) -> Tensor:
        """(..., D) fp32 to the index (...) of the nearest code; of two alike, the first."""
        size = max(1, _MOST_DISTANCES // self.num_codes)
        norms = self.codebook.square().sum(-1) / 2
        found = [
            (norms - part @ self.codebook.T).argmin(-1)
            for part in z.reshape(-1, self.dim).split(size)
        ]
        return torch.cat(found).view(z.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) in 0 .. C - 1 to codes (..., D) fp32."""
        return F.embedding(indices, self.codebook)

    @torch.no_grad()
    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Moves the codes; once per optimizer step. Without a single vector it changes nothing.

        Args:
            statistics: what `forward` returned, summed over micro-batches and processes; the same
                on all of these, which then stay alike.
        """
        if not statistics["counts"].any():
            return
        seen = {name: tensor.to(self.codebook) for name, tensor in statistics.items()}
        self.counts.lerp_(seen["counts"], 1 - self.decay)
        self.sums.lerp_(seen["sums"], 1 - self.decay)
        total = self.counts.sum()
        smooth = (self.counts + _SMOOTHING) / (total + self.num_codes * _SMOOTHING) * total
        used = (self.counts > 0)[:, None]
        self.codebook.copy_(torch.where(used, self.sums / smooth[:, None], self.codebook))
        self._restart(lone_candidates(seen["candidates"], seen["candidate_counts"]))

    def _restart(self, candidates: Tensor) -> None:
        """Codes that are hardly used, the least used first, begin at inputs of this step."""
        even = self.counts.mean()
        rarest = self.counts.argsort(stable=True)
        dead = rarest[self.counts[rarest] < self.restart_below * even][: len(candidates)]
        fresh = candidates[: len(dead)]
        self.codebook[dead] = fresh
        # As much weight as an even use has: time to be chosen before they are unused again.
        self.counts[dead] = even
        self.sums[dead] = fresh * even

    def _observe(self, z: Tensor, indices: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        keep = slice(None) if mask is None else mask.flatten()
        vectors, chosen = z.reshape(-1, self.dim)[keep], indices.flatten()[keep]
        candidates, filled = draw_candidates(vectors, self.num_candidates)
        return {
            "counts": torch.bincount(chosen, minlength=self.num_codes).float(),
            "sums": torch.zeros_like(self.sums).index_add_(0, chosen, vectors),
            "candidates": candidates,
            "candidate_counts": filled,
        }

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.dim}"


class ResidualQuantizer(nn.Module):
    """Several codebooks, each on what those before it left over.

    Args:
        num_codebooks: Q.
        num_codes: C of each.
        dim: D.
        dropout: share of the items that, while training, use only their first 1 .. Q codebooks,
            drawn evenly, so that fewer can be used later (SoundStream). Draws from torch's global
            generator, as dropout does.
        decay, commitment, restart_below, num_candidates: of each `VectorQuantizer`; the commitment
            is the mean over the codebooks that an item uses.

    Raises:
        ConfigError: for sizes below 1, or a dropout outside 0 .. 1.
    """

    def __init__(
        self,
        num_codebooks: int,
        num_codes: int,
        *,
        dim: int,
        dropout: float = 0.0,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_below: float = 0.03,
        num_candidates: int = 256,
    ) -> None:
        super().__init__()
        if num_codebooks < 1 or not 0 <= dropout <= 1:
            raise ConfigError(
                f"residual quantiser: {num_codebooks} codebooks, dropout {dropout}; expected at"
                " least 1, and a share from 0 to 1"
            )
        self.dropout = dropout
        self.quantizers = nn.ModuleList(
            VectorQuantizer(
                num_codes,
                dim,
                decay=decay,
                commitment=commitment,
                restart_below=restart_below,
                num_candidates=num_candidates,
            )
            for _ in range(num_codebooks)
        )

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, depths: Tensor | None = None
    ) -> Quantized:
        """Quantises what is left over, codebook after codebook.

        Args:
            z: (M, ..., D).
            mask: (M, ...) bool, False for padding, which is quantised but not counted.
            depths: (M,) int64 from 1 to Q, how many codebooks each item uses; None draws them while
                training with `dropout`, and else is Q.

        Returns:
            As `Quantized`; names of statistics begin with the number of the codebook and a dot.
        """
        books = self._books()
        depths = self._draw_depths(z) if depths is None else depths
        deep = depths.view(-1, *[1] * (z.ndim - 2)).expand(z.shape[:-1])
        total, found = torch.zeros_like(z, dtype=torch.float32), []
        commitment = total.new_zeros(z.shape[:-1])
        statistics: dict[str, Tensor] = {}
        for q, book in enumerate(books):
            active = deep > q
            counted = active if mask is None else active & mask
            part = book(z.float() - total, mask=counted)
            total = total + (book.lookup(part.indices) * active[..., None]).detach()
            commitment = commitment + part.commitment * active / deep
            found.append(part.indices.where(active, -1))
            statistics |= {f"{q}.{name}": tensor for name, tensor in part.statistics.items()}
        values = z.float() + (total - z.float()).detach()
        return Quantized(values.to(z.dtype), torch.stack(found, dim=-1), commitment, statistics)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (..., Q), or of the first few codebooks, -1 for none, to codes (..., D) fp32."""
        columns = zip(self._books(), indices.unbind(-1), strict=False)
        codes = [book.lookup(c.clamp(min=0)) * (c >= 0)[..., None] for book, c in columns]
        return torch.stack(codes).sum(0)

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Moves the codes of every codebook; as `VectorQuantizer.update`."""
        for q, book in enumerate(self._books()):
            names = [name for name in statistics if name.startswith(f"{q}.")]
            book.update({name.removeprefix(f"{q}."): statistics[name] for name in names})

    def _books(self) -> list[VectorQuantizer]:
        return [cast(VectorQuantizer, book) for book in self.quantizers]

    def _draw_depths(self, z: Tensor) -> Tensor:
        full = torch.full(z.shape[:1], len(self.quantizers), device=z.device)
        if not (self.training and self.dropout):
            return full
        drawn = torch.randint_like(full, 1, len(self.quantizers) + 1)
        return torch.where(torch.rand(full.shape, device=z.device) < self.dropout, drawn, full)


def usage_entropy(counts: Tensor) -> Tensor:
    """How evenly codes are used: 1 if all are alike, 0 if one is used alone or there is only one.

    Args:
        counts: (C,) how often each was chosen, not all zero.

    Returns:
        A scalar, the entropy over its most, log C.
    """
    if len(counts) == 1:
        return torch.zeros((), device=counts.device)
    return torch.special.entr(counts.float() / counts.float().sum()).sum() / math.log(len(counts))
