"""How many numbers a transformers model caches per position: counted, not derived from its config.

Architectures cache keys and values, latents, or nothing that grows, share caches between layers, or
keep a window. So a model without memory (on the meta device) runs over one position and over two,
and what its cache grew by is the answer. transformers' experts are left out: they cache nothing and
their kernels need values to know their shapes.

Footguns:
- Layers with a window grow until it is full; this is what one more position takes until then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from xoron_llm.moe.configuration import XoronMoeConfig

_NO_EXPERTS = "xoron_no_experts"


def numbers_per_position(config: PretrainedConfig) -> int:
    """Numbers that one more cached position takes over all layers.

    Args:
        config: of a causal language model.

    Raises:
        RuntimeError: from torch, if the model cannot run without values.
    """
    ours = isinstance(config, XoronMoeConfig)
    choice = {"experts_implementation": "eager" if ours else _NO_EXPERTS}
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **choice)
        width = config.get_text_config().hidden_size
        rows = (torch.empty(1, n, width, dtype=model.dtype) for n in (1, 2))
        one, two = (_cached(model.eval(), row) for row in rows)
    return two - one


def _cached(model: Any, embeddings: Tensor) -> int:
    output = model.base_model(inputs_embeds=embeddings, use_cache=True)
    layers = getattr(output.get("past_key_values"), "layers", ())
    held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.numel() for tensor in held if isinstance(tensor, Tensor))


def _skip(module: Any, hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden


ALL_EXPERTS_FUNCTIONS.register(_NO_EXPERTS, _skip)
