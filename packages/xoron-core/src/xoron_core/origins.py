"""Where each slot's weights come from, as far as it is known; kept in the model's config.

`random`: as initialised. `source`: loaded by `compose` from the checkpoint that the component's
config names. `trained`: by a run, or from a delta. A folder without the record says nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Literal, cast

from xoron_core.composer.composition import Composition
from xoron_core.configuration import XoronConfig

Origin = Literal["random", "source", "trained"]
_KEY = "weight_origins"


def origins(config: XoronConfig) -> dict[str, Origin]:
    """Origin by slot; slots of unknown origin are left out."""
    return cast("dict[str, Origin]", dict(getattr(config, _KEY, None) or {}))


def record(config: XoronConfig, slots: Iterable[str], origin: Origin) -> None:
    """Notes the origin of some slots."""
    setattr(config, _KEY, origins(config) | dict.fromkeys(slots, origin))


def record_composed(
    config: XoronConfig, composition: Composition, *, but: Container[str] = ()
) -> None:
    """Notes the origins in a model that has just been built: `path` names a component's source.

    Args:
        config: of the model.
        composition: of the model.
        but: slots whose weights are yet to come from elsewhere.
    """
    for name, slot in composition.slots.items():
        if slot.kind != "tokenizer" and slot.ref is None and name not in but:
            record(config, [name], "source" if slot.config.get("path") else "random")
