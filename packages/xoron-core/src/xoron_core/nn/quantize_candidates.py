"""Inputs for codes to restart from, drawn so that what several forward passes drew can be added up.

A sum of samples is no sample. So each pass puts inputs into some of S slots, with a count beside
them, slots of group g with probability 2^-g; after adding up, a slot that was filled once holds an
input as it was. Whether there were one or a thousand passes, the slots of some group are then
mostly filled once, and about an eighth of all slots are.

The draw is a hash of the inputs: no random stream is touched, recomputed activations draw the same,
and processes that were seeded alike draw differently.

Shapes: N vectors, D numbers of each, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_GROUPS = 12


def draw_candidates(vectors: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Puts some of the vectors into some of the slots.

    Args:
        vectors: (N, D) fp32; N may be 0.
        num_slots: S.

    Returns:
        The slots (S, D), zero where empty, and how many vectors each holds (S,), 0 or 1, both fp32.
    """
    N, D = vectors.shape
    if N == 0:
        return vectors.new_zeros(num_slots, D), vectors.new_zeros(num_slots)
    places = torch.arange(N, device=vectors.device)
    seed = _mix(vectors[:, 0].contiguous().view(torch.int32).long() + _mix(places)).sum()
    slots = torch.arange(num_slots, device=vectors.device)
    rows = (_mix(seed + 2 * slots) & 0x7FFFFFFF) % N
    group = slots % NUM_GROUPS
    filled = ((_mix(seed + 2 * slots + 1) & ((1 << group) - 1)) == 0).to(vectors)
    return vectors[rows] * filled[:, None], filled


def lone_candidates(candidates: Tensor, counts: Tensor) -> Tensor:
    """The vectors (n, D) of those slots that were filled exactly once.

    Args:
        candidates: (S, D), summed over passes.
        counts: (S,), summed likewise.
    """
    return candidates[counts == 1]


def _mix(x: Tensor) -> Tensor:
    """Scrambles int64 as SplitMix64 does (Steele et al. 2014), wrapping around."""
    x = (x + 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 30)) * 0x14D049BB133111EB
    x = x ^ (x >> 27)
    return x ^ (x >> 31)
