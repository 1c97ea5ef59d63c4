"""Which arithmetic a recipe runs in on this machine, and the weights' own precision.

Weights that are trained and the optimizer's state are always fp32: in bf16 a small update is lost
in rounding. Autocast casts inside the forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from xoron_core.errors import ConfigError
from xoron_train.recipe import Recipe

# The recipe's word to accelerate's.
_ACCELERATE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def resolve_precision(recipe: Recipe) -> str:
    """Returns `fp32`, `bf16` or `fp16`.

    Raises:
        ConfigError: for fp16 without a GPU, where it is slower than fp32 and has no loss scaling.
    """
    cuda = torch.cuda.is_available()
    if recipe.precision == "auto":
        return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if recipe.precision == "fp16" and not cuda:
        raise ConfigError(
            "precision: fp16 needs a GPU and there is none; use precision: auto, or fp32"
        )
    return recipe.precision


def accelerate_name(precision: str) -> str:
    """Returns accelerate's name of a resolved precision."""
    return _ACCELERATE[precision]


def cast_weights(model: nn.Module, trained: Iterable[nn.Parameter], precision: str) -> None:
    """Makes trained weights fp32, in place; frozen ones too where no autocast reconciles them."""
    chosen = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        if parameter.is_floating_point() and (id(parameter) in chosen or precision == "fp32"):
            parameter.data = parameter.data.float()
    if precision == "fp32":
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
