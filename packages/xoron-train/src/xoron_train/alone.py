"""Which slots learn from media alone: codecs and autoencoders, and losses that judge them.

Inside a sequence they have no gradient, so one run trains either them or what reads sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from xoron_core.components import Autoencoder, Codec, Loss
from xoron_core.errors import ConfigError
from xoron_train.recipe import Recipe

if TYPE_CHECKING:
    from xoron_core.model import XoronModel


def slots_of(model: XoronModel, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """The slots that these parameters, by their names in the model, are of."""
    modules = {name.split(".")[1] for name in trained}
    return [slot for slot in model.composition.slots if slot.replace(".", "__") in modules]


def one_kind(
    model: XoronModel,
    trained: Mapping[str, nn.Parameter],
    *,
    named: bool,
    beside: Sequence[str] = (),
) -> dict[str, nn.Parameter]:
    """Leaves those of the selected parameters that can learn in one run; freezes the others.

    Args:
        model: whose parameters they are.
        trained: as selected.
        named: whether the recipe names them; else they are all that is not frozen, of which codecs,
            autoencoders and their judges are left out, or the others where there is no backbone.
        beside: slots that are trained in part beside them, by an adapter or by rows.

    Raises:
        ConfigError: for both kinds by name.
    """
    slots = slots_of(model, trained)
    alone = [slot for slot in slots if isinstance(model.part(slot), Codec | Autoencoder)]
    judges = [slot for slot in slots if isinstance(model.part(slot), Loss)]
    others = [slot for slot in slots if slot not in (*alone, *judges)]
    others += [slot for slot in beside if slot not in others]
    if alone and others and named:
        raise ConfigError(
            f"train: {', '.join(alone)} learns from media alone, {', '.join(others)} from"
            " sequences, and a run does one of the two; train them in two runs, e.g. first"
            f" train: [{', '.join(alone)}]"
        )
    if named or not others:
        return dict(trained)
    spared = others if model.backbone is None else alone + judges
    modules = {slot.replace(".", "__") for slot in spared}
    kept = {name: p for name, p in trained.items() if name.split(".")[1] not in modules}
    for name in trained.keys() - kept.keys():
        trained[name].requires_grad_(False)
    return kept


def media_slots(model: XoronModel, trained: Sequence[str]) -> tuple[str, ...]:
    """The slots that are trained on media alone, none if the run trains on sequences."""
    return tuple(s for s in trained if isinstance(model.part(s), Codec | Autoencoder))


def require_judges(
    model: XoronModel, recipe: Recipe, *, trained: Sequence[str], learning: Sequence[str]
) -> None:
    """Refuses a run whose loss has parameters that it does not train: its judgement would be noise.

    Args:
        model: composed with losses.
        recipe: its `train`, `freeze` and `loss_weights` are read.
        trained: slots that are.
        learning: slots of losses with parameters that no composition froze.

    Raises:
        ConfigError: naming the slot.
    """
    for slot in learning:
        spared = slot in recipe.freeze or not recipe.loss_weights.get(slot, 1.0)
        if slot not in trained and not spared:
            raise ConfigError(
                f"train: the loss in slot {slot!r} has parameters of its own, which train does not"
                f" name, so that it would judge by noise; add {slot!r} to train, or leave it out by"
                f" loss_weights: {{{slot}: 0}}"
            )
