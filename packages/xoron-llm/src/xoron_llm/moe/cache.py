"""A cache layer that grows in place, so that decoding does not copy the whole cache each step.

transformers' dynamic layer concatenates: at 8,192 cached positions of latent attention that is
18 MB read and written per layer and token, beside the 18 MB that attending reads.

Footguns:
- `keys` and `values` are views of a larger buffer. Cropping and then going on overwrites what was
  cropped, also in a view that was taken before; a deep copy has a buffer of its own.
- Buffers are written in place, which autograd must not see: while gradients are recorded, and while
  compiling, the layer concatenates as its parent does.

Shapes: B rows, G key-value heads, S positions, d width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Positions a buffer starts with, and the share by which it grows.
FIRST, GROWTH = 64, 1.5


class GrowingLayer(DynamicLayer):
    """As `DynamicLayer`, in buffers that hold more positions than are filled."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, G, N, d) new keys and values to all so far, (B, G, S, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        news = (key_states, value_states)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (*news, self.keys))
        if recorded or torch.compiler.is_compiling():
            return cast(tuple[Tensor, Tensor], super().update(*news, *args, **kwargs))
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        olds = (self.keys, self.values)
        if not self._still_ours(olds, total):
            room = max(FIRST, int(total * GROWTH) if past else total + FIRST)
            self._buffers = tuple(t.new_empty(*t.shape[:2], room, t.shape[-1]) for t in news)
            if past:
                for buffer, old in zip(self._buffers, olds, strict=True):
                    buffer[..., :past, :] = old
        for buffer, new in zip(self._buffers, news, strict=True):
            buffer[..., past:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets every position."""
        self._buffers = ()
        super().reset()

    def _still_ours(self, held: tuple[Tensor, Tensor], total: int) -> bool:
        """Whether the buffers have room and `keys` is what they hold.

        Reordering, repeating and selecting rows, and a move to another device put new tensors
        in the place of the views.
        """
        if not self._buffers or self._buffers[0].shape[-2] < total:
            return False
        if self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids writing into them now
        return all(
            buffer.shape[:2] == old.shape[:2]
            and buffer.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
            for buffer, old in zip(self._buffers, held, strict=True)
            if old.numel()
        )


def grow_in_place(cache: Any) -> None:
    """Lets the still empty, plain dynamic layers of a cache grow in place."""
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
