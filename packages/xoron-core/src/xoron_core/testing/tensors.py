"""Nested results as named tensors, what differs between two of them, and seeded noise.

Shapes: M is the number of items; it is the first axis of every tensor of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Named = dict[str, Tensor]


def named(value: Any, name: str = "") -> Named:
    """Every tensor or array inside dicts, sequences and named tuples, by its path."""
    return dict(_walk(value, name))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "result", value
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        yield name or "result", torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f"{name}.{key}" if name else str(key))
    elif hasattr(value, "_fields"):
        yield from _walk(dict(zip(value._fields, value, strict=True)), name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{name}[{index}]")


def take(value: Any, items: Sequence[int] | slice) -> Any:
    """The same nested value with some items of the first axis of every tensor."""
    if isinstance(value, Tensor):
        return value[items] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: take(inner, items) for key, inner in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(take(inner, items) for inner in value))
    return value


def join(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of equal shapes one behind the other."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def cast(value: Any, to: torch.dtype | str) -> Any:
    """The same nested value, floating-point tensors in a dtype, or all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(to) if isinstance(to, str) or value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(inner, to) for key, inner in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(cast(inner, to) for inner in value))
    return value


def common(a: Named, b: Named) -> tuple[Named, Named]:
    """Both with every axis cut to the shorter of the two: what is left is not padding."""
    left, right = {}, {}
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x.ndim != y.ndim:
            left[name], right[name] = x, y
            continue
        cut = tuple(slice(min(n, m)) for n, m in zip(x.shape, y.shape, strict=True))
        left[name], right[name] = x[cut], y[cut]
    return left, right


def difference(a: Named, b: Named, tolerance: float = 0.0) -> str:
    """What differs between two results, in words; empty where nothing does.

    Args:
        a: one result.
        b: the other.
        tolerance: allowed difference of floating-point numbers, relative to the largest of them;
            0 is bit for bit. Everything else must be equal.
    """
    if a.keys() != b.keys():
        return f"one has {sorted(a)}, the other {sorted(b)}"
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return (
                f"{name} is {tuple(x.shape)} {x.dtype} in one and {tuple(y.shape)} {y.dtype} in the"
                " other"
            )
        if tolerance == 0 or not x.is_floating_point():
            unequal = (x != y) & ~((x != x) & (y != y))  # NaN equals NaN here
            if unequal.any():
                return f"{name} differs, first at {_first(unequal)}"
            continue
        limit = tolerance * max(1e-6, _peak(x), _peak(y))
        off = ~((x - y).abs() <= limit)
        if off.any():
            most = (x - y).abs().max().item()
            return f"{name} differs by up to {most:.3g} (allowed {limit:.3g}), at {_first(off)}"
    return ""


def not_finite(values: Named) -> str:
    """The name and place of the first infinity or NaN, in words; empty if there is none."""
    for name, value in values.items():
        wrong = ~torch.isfinite(value)
        if wrong.any():
            return f"{name} is {value[wrong][0].item()} at {_first(wrong)}"
    return ""


def rng(device: Any, seed: int) -> torch.Generator:
    """A seeded generator of random numbers."""
    return torch.Generator(device).manual_seed(seed)


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(tuple(shape), generator=rng("cpu", seed))


def weighted(values: Named) -> Tensor:
    """The sum of all floating-point numbers, each times a fixed random weight.

    Plain sums hide parameters: what a norm follows has a sum that does not move.
    """
    total = torch.zeros(())
    for index, value in enumerate(values.values()):
        if value.is_floating_point():
            total = total + (value.float() * noise(value.shape, index)).sum()
    return total


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])


def _peak(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0
