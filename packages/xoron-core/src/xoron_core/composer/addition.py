"""What is added to a composition that exists: everything there stays as it is."""

from __future__ import annotations

from typing import Literal

from xoron_core.composer.composition import Composition, Slot, TokensConfig
from xoron_core.errors import CompositionError


def joined(base: Composition, addition: Composition) -> Composition:
    """A composition with further slots, token groups, placeholders and routes.

    Raises:
        CompositionError: if a slot of the base would be another one.
    """
    for name, slot in addition.slots.items():
        if name in base.slots and (changed := _changes(base.slots[name], slot)):
            raise CompositionError(
                f"slot {name!r}: what is there stays as it is, but the addition has {changed};"
                " leave the slot out of what is added, or compose anew"
            )
    groups: tuple[str, ...] | Literal["all"] = "all"
    if base.tokens.groups != "all" != addition.tokens.groups:
        groups = tuple(dict.fromkeys([*base.tokens.groups, *addition.tokens.groups]))
    tokens = {
        "groups": groups,
        "template": base.tokens.template,
        "placeholders": addition.tokens.placeholders | base.tokens.placeholders,
        "markers": addition.tokens.markers | base.tokens.markers,
    }
    return Composition(
        name=base.name,
        slots=addition.slots | base.slots,
        tokens=TokensConfig.parse(tokens),
        routes=addition.routes | base.routes,
    )


def _changes(before: Slot, after: Slot) -> str:
    """What a slot would have otherwise, or nothing."""
    if (before.kind, before.use, before.ref) != (after.kind, after.use, after.ref):
        return f"{after.kind}/{after.use} instead of {before.kind}/{before.use}"
    return ", ".join(
        f"{key}: {value!r} instead of {before.config.get(key)!r}"
        for key, value in after.config.items()
        if before.config.get(key) != value
    )
