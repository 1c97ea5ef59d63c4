"""Builds the parts of a composition, on whatever device is current (meta for plans).

Every part gets its own random seed derived from its slot, so that adding or removing a slot never
changes how another one is initialised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from xoron_core.components import Backbone, Context, Fusion, Tokenizer
from xoron_core.composer.composition import Composition, Slot, load_factory
from xoron_core.config import Config
from xoron_core.descriptors import resolve
from xoron_core.errors import CompositionError
from xoron_core.plugins import Registry
from xoron_core.tokens.space import TokenSpace


def slot_seed(seed: int, slot: str) -> int:
    """A seed for one slot, independent of which other slots there are."""
    digest = hashlib.sha256(f"{seed}/{slot}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def typed_config(registry: Registry, slot: Slot) -> Config:
    """A slot's config as its component's own class."""
    component = registry.component(slot.kind, slot.use)
    config: Config = resolve(component.config).parse(slot.config)
    return config


def build_tokenizer_part(registry: Registry, name: str, slot: Slot) -> Tokenizer:
    """Builds the tokenizer component; it reads files only when asked for its base."""
    component = registry.component("tokenizer", slot.use)
    part: Tokenizer = load_factory(registry, component)(
        typed_config(registry, slot), Context(slot=name)
    )
    return part


def build_part(
    registry: Registry,
    name: str,
    slot: Slot,
    *,
    space: TokenSpace | None,
    parts: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """Builds one neural part.

    Raises:
        PluginError: if its plug-in is missing.
        CompositionError: from the component, if it cannot work here.
    """
    component = registry.component(slot.kind, slot.use)
    factory = load_factory(registry, component)
    context = Context(
        slot=name,
        hidden_size=slot.hidden_size,
        feature_size=slot.feature_size,
        space=space,
        parts=parts,
        fusion_layers=slot.fusion_layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(slot_seed(seed, name))
        part: nn.Module = factory(typed_config(registry, slot), context)
    if slot.freeze:
        part.requires_grad_(False)
    return part


def build_parts(
    registry: Registry, composition: Composition, space: TokenSpace | None, seed: int = 0
) -> tuple[dict[str, nn.Module], Composition]:
    """Builds every neural part in order.

    Returns:
        The parts by slot (a reference is the very instance it names) and the composition with the
        widths that each part was built between.
    """
    parts: dict[str, nn.Module] = {}
    slots: dict[str, Slot] = dict(composition.slots)
    for name, slot in composition.slots.items():
        if slot.kind == "tokenizer":
            continue
        if slot.ref is not None:
            continue
        slot = slot.model_copy(update=_surroundings(name, slot, parts))
        slots[name] = slot
        parts[name] = build_part(registry, name, slot, space=space, parts=parts, seed=seed)
        if slot.kind == "fusion":
            _check_layers(name, parts[name], slot.fusion_layers)
    for name, slot in composition.slots.items():
        if slot.ref is not None:
            parts[name] = parts[slot.ref]
    return parts, composition.model_copy(update={"slots": slots})


def _surroundings(name: str, slot: Slot, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What is recorded of the parts around one, from those built before it or from the folder."""
    hidden_size, feature_size = slot.hidden_size, slot.feature_size
    backbone = next((part for part in parts.values() if isinstance(part, Backbone)), None)
    if backbone is not None and slot.kind != "backbone":
        hidden_size = backbone.hidden_size
    encoder = parts.get(f"{name.rpartition('.')[0]}.encoder")
    if slot.kind == "projector" and encoder is not None:
        feature_size = int(getattr(encoder, "feature_size", 0)) or None
    if slot.kind == "projector" and feature_size is None:
        raise CompositionError(
            f"slot {name!r}: a projector needs the encoder whose features it reads; fill"
            f" {name.rpartition('.')[0]}.encoder"
        )
    found: dict[str, Any] = {"hidden_size": hidden_size, "feature_size": feature_size}
    if slot.kind == "fusion":
        found["fusion_layers"] = _fusion_layers(name, backbone, parts)
    return found


def _fusion_layers(
    name: str, backbone: Backbone | None, parts: Mapping[str, nn.Module]
) -> tuple[int, ...]:
    """Where the backbone takes a fusion."""
    other = next((slot for slot, part in parts.items() if isinstance(part, Fusion)), None)
    if other is not None:
        raise CompositionError(
            f"slots {other!r} and {name!r} both hold a fusion, expected one: it reads the media of"
            " all modalities; remove one of them"
        )
    if backbone is None:
        raise CompositionError(
            f"slot {name!r}: a fusion stands between the layers of a backbone, and this composition"
            " has none; add backbone: {use: xoron-moe}, or remove the fusion"
        )
    if not backbone.fusion_layers:
        raise CompositionError(
            f"slot {name!r}: {type(backbone).__name__} takes no fusion between its layers; use"
            " backbone: {use: xoron-moe}, or remove the fusion"
        )
    return tuple(backbone.fusion_layers)


def _check_layers(name: str, part: nn.Module, allowed: tuple[int, ...]) -> None:
    wrong = sorted(set(cast(Fusion, part).layers) - set(allowed))
    if wrong:
        raise CompositionError(
            f"slot {name!r}: a fusion after layers {wrong}, but this backbone takes one after"
            f" {list(allowed)} (indices from 0); change `layers`"
        )
