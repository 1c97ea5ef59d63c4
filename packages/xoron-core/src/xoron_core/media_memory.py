"""What a fusion remembers of media, until the last step of an answer.

The features are the embeddings that projectors put into the sequence, item by item. A position may
look at an item if the item begins before it or at it, in the same row and packed document: this is
the causal order, so decoding step by step equals one pass.

The memory lives in the key-value cache, as one layer behind the backbone's. Whatever is done to the
cache (reordering beams, repeating rows, copying, resetting) is then done to it too.

Footguns:
- Columns count from the first of the cache, padding included, never from a row's first id.
- A cache crops its layers in order, so this one learns from the first how long the cache is then;
  what began behind the end is forgotten.
- A sliding window bounds self-attention only: media stay in sight of a fusion.

Shapes: B rows, N new columns, S remembered features of a row, D backbone width, M items.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from xoron_core import fill
from xoron_core.components import AfterLayer, Fusion

# A column that no position reaches: of padding, and of what is forgotten.
NEVER = 2**62
# Over a fixed-length cache, S is a multiple of this, so that requests share compiled graphs.
STATIC_MULTIPLE = 64


class MediaMemory(NamedTuple):
    """Features that positions may look at.

    Attributes:
        starts: (B, S) int64, the column where each feature's item begins, or `NEVER`.
        states: what the fusion keeps of them, each (B, S, ...).
    """

    starts: Tensor
    states: tuple[Tensor, ...]


class MediaLayer(CacheLayerMixin):
    """A cache's layer that holds a `MediaMemory` and no position.

    Args:
        memory: what it holds.
        first: the first layer of the cache, which knows how many columns there are.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    # Whoever looks for a layer with every position, or for the next one to bring back from another
    # device, goes past a layer that says so.
    is_sliding = True

    def __init__(self, memory: MediaMemory, first: Any) -> None:
        super().__init__()
        self.memory: MediaMemory | None = memory
        self.first = first
        self.is_initialized = True

    def behind(self, first: Any) -> MediaLayer:
        """The same memory for another cache, whose first layer is given."""
        assert self.memory is not None
        return MediaLayer(self.memory, first)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows at (B',) indices."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the rows at (B',) indices."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forgets everything."""
        self.memory = None

    def crop(self, *_: Any) -> None:
        """Forgets what began behind the end of the cache, which has been cropped by now."""
        if self.memory is not None:
            starts, states = self.memory
            gone = starts >= self.first.get_seq_length()
            self.memory = MediaMemory(starts.masked_fill(gone, NEVER), states)

    def offload(self) -> None:
        """Nothing: it is small."""

    def prefetch(self) -> None:
        """Nothing: it is never offloaded."""

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing: it is made with its memory."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Never called: no layer of a backbone has its index."""
        raise NotImplementedError("a MediaLayer holds no keys and values of positions")

    def get_seq_length(self, *_: Any) -> int:
        """0: it holds no position."""
        return 0

    def get_max_length(self) -> int:
        """-1: any number of features."""
        return -1

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[int, int]:
        """No keys of positions."""
        return 0, 0

    def _map(self, function: Any) -> None:
        if self.memory is not None:
            starts, states = self.memory
            self.memory = MediaMemory(function(starts), tuple(map(function, states)))


def remember(
    fusion: Fusion | None, embeds: Tensor, spans: Tensor | None, *, cache: Any
) -> MediaMemory | None:
    """What positions of this forward may look at: what is in the cache, and the items it brings.

    Args:
        fusion: of the model, or None.
        embeds: (B, N, D), with the items' features in place.
        spans: (M, 3) of these items, or None.
        cache: of the columns before these, or None.

    Returns:
        The memory, or None where the fusion has nothing to do. A fusion that is being trained
        always has: on text alone features that nobody sees, so that its gradients are zero there
        and never None on one process and a number on another.
    """
    if fusion is None:
        return None
    old = recall(cache)
    if spans is not None and bool(spans[:, 2].any()):
        features, starts = collect(embeds, spans, columns(cache))
    elif old is None and fusion.training and any(p.requires_grad for p in fusion.parameters()):
        features = torch.zeros_like(embeds[:, :1])
        starts = torch.full((len(embeds), 1), NEVER, device=embeds.device)
    else:
        return old
    return join(old, MediaMemory(starts, fusion.remember(features)))


def after_layer(
    fusion: Fusion, memory: MediaMemory, new: Tensor, *, cache: Any, document_ids: Tensor | None
) -> AfterLayer:
    """What a backbone calls after its layers to let N new columns look at a memory.

    `new` (N,) are these columns, counted from the first one behind the cache.
    """
    past, layers = columns(cache), set(fusion.layers)
    seen = visible(memory.starts, new + past, document_ids=document_ids)

    def fuse(hidden: Tensor, layer: int) -> Tensor:
        if layer not in layers:
            return hidden
        return cast(Tensor, fusion(hidden, memory.states, visible=seen, layer=layer))

    return fuse


def columns(cache: Any) -> Any:
    """Columns that a cache holds; a tensor for one of fixed length."""
    return 0 if cache is None else cache.get_seq_length()


def recall(cache: Any) -> MediaMemory | None:
    """The memory in a cache, or None if there is none."""
    layers = getattr(cache, "layers", None)
    return layers[-1].memory if layers and isinstance(layers[-1], MediaLayer) else None


def keep(cache: Any, memory: MediaMemory) -> None:
    """Puts a memory into a cache that the backbone has filled, in place of the one it had."""
    if cache.is_compileable:
        short = -memory.starts.shape[1] % STATIC_MULTIPLE
        memory = MediaMemory(
            F.pad(memory.starts, (0, short), value=NEVER),
            tuple(F.pad(t, (0, 0) * (t.ndim - 2) + (0, short)) for t in memory.states),
        )
    if isinstance(cache.layers[-1], MediaLayer):
        cache.layers[-1].memory = memory
    else:
        cache.layers.append(MediaLayer(memory, cache.layers[0]))


def join(old: MediaMemory | None, new: MediaMemory) -> MediaMemory:
    """Both memories of the same rows as one."""
    if old is None:
        return new
    return MediaMemory(
        torch.cat([old.starts, new.starts], dim=1),
        tuple(torch.cat(pair, dim=1) for pair in zip(old.states, new.states, strict=True)),
    )


def collect(embeds: Tensor, spans: Tensor, past: int | Tensor) -> tuple[Tensor, Tensor]:
    """Takes the features of all items out of the sequence they were put into.

    Args:
        embeds: (B, N, D), filled.
        spans: (M, 3), with at least one position in all.
        past: cached columns before these.

    Returns:
        (B, S, D) features, zero behind a row's last one, and their (B, S) starts.
    """
    B, N, D = embeds.shape
    ordered = spans[(spans[:, 0] * N + spans[:, 1]).argsort()]
    flat = fill.flat_positions(ordered, N)
    row = flat // N
    counts = torch.bincount(row, minlength=B)
    S = int(counts.max())
    rank = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[row]
    place = row * S + rank
    begins = torch.repeat_interleave(ordered[:, 1], ordered[:, 2]) + past
    starts = begins.new_full((B * S,), NEVER).index_copy(0, place, begins)
    picked = embeds.reshape(B * N, D).index_select(0, flat)
    features = embeds.new_zeros(B * S, D).index_copy(0, place, picked)
    return features.view(B, S, D), starts.view(B, S)


def visible(starts: Tensor, column: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Which features N new columns may look at.

    Args:
        starts: (B, S).
        column: (N,), counted from the first of the cache.
        document_ids: (B, past + N), 1.. per document, or None.

    Returns:
        (B, N, S) bool.
    """
    seen = starts[:, None, :] <= column[:, None]
    if document_ids is not None:
        last = document_ids.shape[1] - 1
        documents = document_ids.gather(1, starts.clamp(max=last))
        seen = seen & (documents[:, None, :] == document_ids[:, column][:, :, None])
    return seen
