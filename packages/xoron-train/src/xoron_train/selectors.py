"""Which parameters a recipe trains.

A selector is a slot name (`backbone`, `image.encoder`) or a glob over parameter names
(`slots.backbone.model.layers.0.*`; `*` also crosses dots). One that matches nothing is an error: a
mistyped name must not quietly train, or spare, something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from xoron_core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

_SHOWN = 8
# Linear layers that choose or scale instead of computing features.
_GATES = {"gate", "router", "shared_expert_gate"}


def apply_selectors(
    model: XoronModel, *, train: Iterable[str] = (), freeze: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Marks what is trained and returns it by name; the rest gets `requires_grad=False`.

    Args:
        model: as loaded; slots that its composition freezes are already marked.
        train: what is trained, also out of frozen slots; empty for all that is not frozen.
        freeze: what stays, over `train`.

    Raises:
        ConfigError: if a selector matches nothing, or nothing is left to train.
    """
    train, freeze = tuple(train), tuple(freeze)
    if train:
        chosen = {id(p) for selector in train for p in select(model, selector, key="train")}
    else:
        chosen = {id(p) for p in model.parameters() if p.requires_grad}
    chosen -= {id(p) for selector in freeze for p in select(model, selector, key="freeze")}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            trained[name] = parameter
    if not trained:
        raise ConfigError(
            "nothing is left to train: every parameter is frozen by the composition or by"
            f" freeze: {list(freeze)}; name something under train"
        )
    return trained


def select(model: XoronModel, selector: str, *, key: str) -> list[nn.Parameter]:
    """Returns the parameters one selector matches; a tied one is found under each of its names.

    Args:
        model: where to look.
        selector: a slot name or a glob.
        key: the recipe's key that holds it, for the error.

    Raises:
        ConfigError: if it matches nothing.
    """
    slots = [name for name, slot in model.composition.slots.items() if slot.kind != "tokenizer"]
    if selector in slots:
        return list(model.part(selector).parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    found = [parameter for name, parameter in named if fnmatchcase(name, selector)]
    if not found:
        names = [name for name, _ in named]
        more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
        raise ConfigError(
            f"{key}: {selector!r} matches no slot and no parameter."
            f"{did_you_mean(selector, [*slots, *names])} Slots: {', '.join(slots)}. Parameters:"
            f" {', '.join(names[:_SHOWN])}{more}"
        )
    return found


def linear_layers(model: XoronModel, selectors: Iterable[str] = ()) -> list[str]:
    """Names, below the backbone's transformers model, of the linear layers that LoRA adapts.

    Args:
        model: where to look.
        selectors: the backbone's slot, or globs of names of its layers or their parameters
            (`*.q_proj`, `slots.backbone.model.model.layers.0.*`); empty for every linear layer
            but the head and gates.

    Raises:
        ConfigError: if a selector matches no linear layer of the backbone, or there is none.
    """
    backbone = model.need_backbone()
    prefix = f"slots.{backbone.slot.replace('.', '__')}.model."
    head = backbone.model.get_output_embeddings()
    names = {
        f"{prefix}{name}": name
        for name, layer in backbone.model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and name.rpartition(".")[2] not in _GATES
    }
    if not names:
        raise ConfigError(
            f"lora: {type(backbone.model).__name__} has no linear layers to adapt; train the"
            " backbone whole"
        )
    chosen: set[str] = set()
    for selector in selectors or [backbone.slot]:
        stem = selector.removesuffix(".weight")
        found = {short for name, short in names.items() if fnmatchcase(name, stem)}
        if selector == backbone.slot:
            found = set(names.values())
        if not found:
            shown = list(names)
            more = f", ... ({len(shown)} in all)" if len(shown) > _SHOWN else ""
            raise ConfigError(
                f"lora.targets: {selector!r} matches no linear layer of the backbone."
                f"{did_you_mean(selector, [backbone.slot, *names])} Its layers:"
                f" {', '.join(shown[:_SHOWN])}{more}"
            )
        chosen |= found
    return sorted(chosen)
