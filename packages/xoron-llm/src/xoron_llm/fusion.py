"""Cross-attention fusion: adapters through which a sequence reads media between backbone layers.

Each adapter is one `CrossAttention` block, added to the backbone's stream after its layer. Keys and
values of all adapters are made once, when a medium enters the sequence, and kept beside the cache.
At initialisation the output projections are zero, so the model is bit for bit the one without it.

Footgun: training on text alone gives these parameters zero gradients, which weight decay still
shrinks; freeze the slot for that.

Shapes: B rows, N positions, S features of a row, D backbone width, A adapters.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from xoron_core.components import Context, Fusion
from xoron_core.errors import CompositionError
from xoron_core.nn.cross_attention import CrossAttention
from xoron_llm.fusion_config import CrossAttentionConfig


class CrossAttentionFusion(Fusion):
    """A adapters at the layers of `config`.

    Raises:
        CompositionError: if the backbone's width does not divide into heads, or nothing says which
            layers there are.
    """

    config: CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.hidden_size is None:
            raise CompositionError(
                f"slot {context.slot!r}: a fusion takes its width from a backbone, and there is"
                " none; add backbone: {use: xoron-moe}"
            )
        if config.head_dim is None and context.hidden_size % config.num_heads:
            raise CompositionError(
                f"slot {context.slot!r}: the backbone's width {context.hidden_size} is not a"
                f" multiple of num_heads {config.num_heads}; change num_heads or give head_dim"
            )
        self._layers = config.layers or spaced(context.fusion_layers, config.num_layers)
        self.adapters = nn.ModuleList(
            CrossAttention(
                context.hidden_size,
                config.num_heads,
                head_dim=config.head_dim,
                norm_eps=config.rms_norm_eps,
                initializer_range=config.initializer_range,
            )
            for _ in self._layers
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Backbone layers after which there is an adapter."""
        return self._layers

    def remember(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, S, D) to 2 A tensors (B, S, heads * head_dim): keys and values of each adapter."""
        pairs = (cast(CrossAttention, block).keys_values(features) for block in self.adapters)
        return tuple(tensor for pair in pairs for tensor in pair)

    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, ...], *, visible: Tensor, layer: int
    ) -> Tensor:
        """(B, N, D) to (B, N, D); see `Fusion.forward`."""
        index = self._layers.index(layer)
        keys, values = memory[2 * index : 2 * index + 2]
        return hidden + self.adapters[index](hidden, keys, values, visible=visible)


def spaced(available: tuple[int, ...], number: int) -> tuple[int, ...]:
    """At most `number` of the available layers, evenly spaced, the last one among them."""
    number = min(number, len(available))
    return tuple(available[(step + 1) * len(available) // number - 1] for step in range(number))
