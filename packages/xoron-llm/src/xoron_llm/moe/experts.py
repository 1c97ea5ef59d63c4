"""transformers' choice of an experts implementation, for xoron-moe.

`model.set_experts_implementation(name)`, on a composed model too, or
`from_pretrained(..., experts_implementation=name)`:

- `eager`, the default: whichever `xoron_core.nn.experts` measured to be faster here.
- `slices`: each expert on its own rows.
- `grouped`, by transformers' name `grouped_mm`: one grouped product for all experts, where their
  layers allow it.

transformers' other implementations read all experts' weights as one stacked tensor. Here each
expert has weights of its own, so that adapters and quantisers find them and no gradient is copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from xoron_core.errors import ConfigError
from xoron_core.nn.experts import Kernel
from xoron_llm.moe.configuration import XoronMoeConfig

KERNELS: dict[str, Kernel | None] = {
    "eager": None,
    "slices": "slices",
    "grouped": "grouped",
    "grouped_mm": "grouped",
}


def experts_kernel(config: XoronMoeConfig) -> Kernel | None:
    """The kernel that a model of this config runs its experts with; None chooses by rule."""
    return KERNELS[config._experts_implementation or "eager"]


class ExpertsChoice:
    """What a transformers model has to answer so that its experts' implementation can be set."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The name itself, `eager` for None.

        Raises:
            ConfigError: if xoron-moe has no such implementation.
        """
        if requested_experts is not None and requested_experts not in KERNELS:
            raise ConfigError(
                f"experts_implementation is {requested_experts!r}, expected one of"
                f" {', '.join(KERNELS)}: xoron-moe keeps each expert's weights apart, and the"
                " others read stacked ones"
            )
        return requested_experts or "eager"


def _for_xoron_moe_alone(module: Any, *_: Tensor) -> Tensor:
    """What transformers' own experts call if one of our names was set on them."""
    name = module.config._experts_implementation
    raise ConfigError(
        f"experts_implementation {name!r} is for xoron-moe; {type(module).__name__} takes eager,"
        " grouped_mm or batched_mm"
    )


# A composed model checks a name against this list before it hands it to its backbone.
for _name in ("slices", "grouped"):
    ALL_EXPERTS_FUNCTIONS.register(_name, _for_xoron_moe_alone)
