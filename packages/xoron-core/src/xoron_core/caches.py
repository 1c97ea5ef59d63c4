"""Key-value caches of a session: growing, of fixed length, or sliding over a window.

`Lane` is one model with its cache over the columns of a batch. A column is one position of every
row; a row's mask says which columns are its own. Columns that are masked in the middle (ids of a
draft that were not accepted, padding behind a shared prefix) take no position: positions count
what is valid.

Footguns:
- A static cache knows its length as a tensor, so that a compiled step never changes; mask and
  positions are therefore made here and handed to the model ready-made.
- A window counts columns, so it fits rows that are padded on the left only.

Shapes: B rows, N new columns, C columns so far with the new ones, S keys, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from xoron_core.errors import CompositionError, ConfigError, SequenceError
from xoron_core.media_memory import MediaLayer
from xoron_core.model import XoronModel
from xoron_core.outputs import XoronOutput

_IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class CacheOptions:
    """How a session keeps keys and values.

    Attributes:
        kind: `dynamic` grows with the text; `static` has a fixed length, so that a decoding step
            always has the same shapes.
        max_length: columns of a static cache; None takes what the request can need.
        window: a position sees the last `window` columns, itself included, and a dynamic cache
            keeps no more; None is all of them. The model computes something else with a window than
            without, unless it was trained with it.
        compile: whether to compile the decoding step; static only.
    """

    kind: Literal["dynamic", "static"] = "dynamic"
    max_length: int | None = None
    window: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("dynamic", "static"):
            raise ConfigError(f"cache {self.kind!r}: expected 'dynamic' or 'static'")
        if self.max_length is not None and self.kind != "static":
            raise ConfigError("max_length is the length of a static cache; add cache='static'")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length {self.max_length}: expected 1 or more")
        if self.window is not None and self.window < 2:
            raise ConfigError(f"window {self.window}: expected 2 or more positions")
        if self.compile and self.kind != "static":
            raise ConfigError("compile needs the fixed shapes of a static cache: cache='static'")

    @property
    def plain(self) -> bool:
        """Whether the cache keeps every column and grows: what reuse and drafts need."""
        return self.kind == "dynamic" and self.window is None


def decode_step(
    model: XoronModel, embeds: Tensor, *, mask: Tensor, positions: Tensor, cache: Any
) -> XoronOutput:
    """One step over a static cache; nothing in it depends on values, so it compiles as one graph.

    Args:
        model: the model.
        embeds: (B, 1, D).
        mask: (B, 1, 1, S), True (or 0) where a key may be seen.
        positions: (B, 1) int64.
        cache: a static cache, changed in place.
    """
    return cast(
        XoronOutput,
        model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ),
    )


@cache
def _compiled_step() -> Callable[..., XoronOutput]:
    """One compiled function for all lanes, so that a later request finds its graph again."""
    return torch.compile(decode_step, fullgraph=True, dynamic=False)


class Step(NamedTuple):
    """Attributes: logits (B, kept, V); hidden (B, N, D)."""

    logits: Tensor
    hidden: Tensor


class Lane:
    """A model and its cache.

    Args:
        model: the model.
        options: of the cache.
        capacity: columns that the request can need.
        cache: a dynamic cache to go on with, or None.
        length: columns it holds.

    Attributes:
        length: columns in the cache.
        positions: positions that went through the model, padding included.
        steps: forward passes.

    Raises:
        CompositionError: if the model cannot do what the options say.
        SequenceError: if a static cache is too short for the request.
    """

    def __init__(
        self,
        model: XoronModel,
        options: CacheOptions,
        capacity: int,
        *,
        cache: Any = None,
        length: int = 0,
    ) -> None:
        self.model = model
        self.options = options
        self.cache = cache
        self.length = length
        self.positions = self.steps = self.size = 0
        if options.plain:
            return
        _check(model, options)
        if options.kind == "static":
            # Rounded up, so that requests of about the same length share one compiled graph.
            size = options.max_length or max(64, 1 << (capacity - 1).bit_length())
            if size < capacity:
                raise SequenceError(
                    f"this request can need {capacity} positions, but the static cache holds"
                    f" {size}; raise max_length or lower max_new_tokens"
                )
            self.size = size
            self.cache = StaticCache(config=model.config, max_cache_len=size)
        else:
            layers = [DynamicSlidingWindowLayer(cast(int, options.window)) for _ in _layers(model)]
            self.cache = Cache(layers=cast(Any, layers))

    @torch.no_grad()
    def run(self, mask: Tensor, *, keep: int = 1, **inputs: Any) -> Step:
        """Runs the columns that are not cached yet.

        Args:
            mask: (B, C), 1 where a column belongs to the row.
            keep: logits of that many last columns.
            **inputs: `input_ids` (B, N) or `inputs_embeds` (B, N, D), and `media`.
        """
        new = mask.shape[1] - self.length
        if self.options.plain:
            output = self.model(
                **inputs,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        else:
            output = self._run_masked(mask, new, keep, inputs)
        self.cache = output.past_key_values
        self.length += new
        self.positions += mask.shape[0] * new
        self.steps += 1
        return Step(output.logits, output.hidden)

    def crop(self, columns: int) -> None:
        """Takes the last columns out of a plain cache."""
        if columns:
            self.cache.crop(-columns)
            self.length -= columns

    def _run_masked(self, mask: Tensor, new: int, keep: int, inputs: dict[str, Any]) -> Any:
        if self.options.kind == "static":
            keys, offset = self.size, 0
        else:
            keys, offset = self.cache.get_mask_sizes(new, 0)
        square = _square_mask(mask, new, keys, offset=offset, window=self.options.window)
        if _implementation(self.model) == "eager":
            lowest = torch.finfo(self.model.dtype).min
            square = torch.zeros_like(square, dtype=self.model.dtype).masked_fill(~square, lowest)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        # A view's strides would grow with every step, and each would be compiled anew.
        positions = positions.clone(memory_format=torch.contiguous_format)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and new == 1 and self.options.kind == "static":
            return self._one_step(embeds, square, positions)
        return self.model(
            **inputs,
            attention_mask=square,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )

    def _one_step(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> XoronOutput:
        if not self.options.compile:
            return decode_step(self.model, embeds, mask=mask, positions=positions, cache=self.cache)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return _compiled_step()(
                self.model, embeds, mask=mask, positions=positions, cache=self.cache
            )
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CompositionError(
                "this model's decoding step does not compile as one graph; leave compile off."
                f" ({type(error).__name__}: {reason})"
            ) from error


def cut_by_columns(cache: Any, columns: int) -> bool:
    """Whether each layer of a cache holds exactly that many columns and can give some back."""
    if not isinstance(cache, Cache):
        return False
    layers = [layer for layer in cache.layers if not isinstance(layer, MediaLayer)]
    return (
        not any(getattr(layer, "is_sliding", False) for layer in layers)
        and all(hasattr(layer, "crop") for layer in layers)
        and all(_length(layer) in (None, columns) for layer in layers)
        and any(_length(layer) == columns for layer in layers)
    )


def _length(layer: Any) -> int | None:
    """Columns of a layer; None for one that only shares another layer's."""
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else None


def _layers(model: XoronModel) -> range:
    return range(int(model.config.num_hidden_layers))


def _implementation(model: XoronModel) -> str:
    return str(model.need_backbone().model.config._attn_implementation)


def _check(model: XoronModel, options: CacheOptions) -> None:
    """Refuses models to which a ready-made mask would say something else."""
    what = "a window" if options.window else "a static cache"
    backbone = model.need_backbone()
    if backbone.position_kind != "1d":
        raise CompositionError(
            f"{what} needs a backbone with one position per token, but this one takes"
            f" {backbone.position_kind!r} positions; use cache='dynamic' without a window"
        )
    types = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if types or getattr(model.config, "sliding_window", None):
        raise CompositionError(
            f"{what} needs layers that attend to everything, but this backbone has"
            f" {', '.join(sorted(types)) or 'sliding'} layers; use cache='dynamic' without a window"
        )
    if _implementation(model) not in _IMPLEMENTATIONS:
        raise CompositionError(
            f"{what} needs attention that takes a mask, but this model was loaded with"
            f" {_implementation(model)!r}; load it with attn_implementation='sdpa'"
        )


def _square_mask(mask: Tensor, new: int, keys: int, *, offset: int, window: int | None) -> Tensor:
    """(B, C) to (B, 1, N, S) bool: which of the keys of columns offset .. offset + S - 1 the last
    N columns see; every column sees itself, as in `xoron_core.nn.masks`."""
    columns = mask.shape[1]
    query = torch.arange(columns - new, columns, device=mask.device)[:, None]
    key = torch.arange(offset, offset + keys, device=mask.device)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    padded = torch.nn.functional.pad(mask, (0, max(0, offset + keys - columns)))
    valid = (padded != 0)[:, None, offset : offset + keys]
    return ((seen & valid) | (key == query)).unsqueeze(1)
