"""Plans a composition on the meta device: checked and counted before a byte is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xoron_core.components import Encoder, Part, Projector
from xoron_core.composer.composition import Composition
from xoron_core.composer.space import allocate_space
from xoron_core.configuration import XoronConfig
from xoron_core.errors import CompositionError
from xoron_core.plugins import Registry
from xoron_core.tokens.space import TokenSpace

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

# fp32 weight, gradient and two Adam moments.
TRAIN_BYTES = 16


@dataclass(frozen=True)
class SlotRow:
    """One line of the parameter table.

    Attributes:
        parameters: all of the slot's parameters, ties counted once.
        active: those that one token uses; fewer than all where experts are routed.
        trainable: those that require a gradient.
    """

    slot: str
    component: str
    distribution: str
    parameters: int
    active: int
    trainable: int


@dataclass(frozen=True)
class Plan:
    """A checked composition.

    Attributes:
        composition: with the widths that each part sits between.
        space: the token space, or None.
        rows: the parameter table, one line per slot.
        cache_bytes_per_token: at the model's dtype (fp32 in a plan).
    """

    composition: Composition
    space: TokenSpace | None
    rows: tuple[SlotRow, ...]
    cache_bytes_per_token: int

    @property
    def parameters(self) -> int:
        """Total over slots."""
        return sum(row.parameters for row in self.rows)

    @property
    def memory(self) -> dict[str, int]:
        """Estimated bytes: `weights` in fp32, and `training` with gradients and Adam's moments
        for what is trainable (activations not counted)."""
        trainable = sum(row.trainable for row in self.rows)
        return {
            "weights": 4 * self.parameters,
            "training": 4 * (self.parameters - trainable) + TRAIN_BYTES * trainable,
        }

    def data(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return {
            "name": self.composition.name,
            "slots": [vars(row) for row in self.rows],
            "parameters": {
                "total": self.parameters,
                "active": sum(row.active for row in self.rows),
                "trainable": sum(row.trainable for row in self.rows),
            },
            "memory_bytes": self.memory,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "token_space": None
            if self.space is None
            else {
                "hash": self.space.hash,
                "rows": self.space.size,
                "ranges": [[r.name, r.start, r.size] for r in self.space.ranges],
            },
        }


def plan(composition: Composition, registry: Registry, lock: TokenSpace | None = None) -> Plan:
    """Builds a composition on the meta device and checks that its parts fit.

    Args:
        composition: what to build.
        registry: the plug-ins.
        lock: a token space to append under.

    Raises:
        PluginError, CompositionError, TokenSpaceError: with what does not fit.
    """
    from xoron_core.model import XoronModel

    space = allocate_space(composition, registry, lock)
    with torch.device("meta"):
        model = XoronModel(XoronConfig(composition=composition.data()), space, registry=registry)
        check_widths(model)
    return Plan(
        model.composition, space, tuple(parameter_rows(model)), cache_bytes_per_token(model, 4)
    )


def parameter_rows(model: XoronModel) -> Iterable[SlotRow]:
    """The parameter table of a model, on any device."""
    for name, slot in model.composition.slots.items():
        if slot.kind == "tokenizer" or slot.ref is not None:
            continue
        part: Part = model.part(name)
        yield SlotRow(
            slot=name,
            component=f"{slot.kind}/{slot.use}",
            distribution=slot.distribution,
            parameters=sum(p.numel() for p in part.parameters()),
            active=part.active_parameters(),
            trainable=sum(p.numel() for p in part.parameters() if p.requires_grad),
        )


def cache_bytes_per_token(model: XoronModel, element_size: int) -> int:
    """Bytes that one cached position takes over all layers; 0 without a backbone."""
    if model.backbone is None:
        return 0
    return model.backbone.cache_width() * element_size


def check_widths(model: XoronModel) -> None:
    """Runs encoders and projectors on their dummy batches and compares widths and counts.

    Raises:
        CompositionError: naming the slots and both numbers.
    """
    backbone = model.backbone
    for slot, encoder in model.parts(Encoder).items():
        stem = slot.rpartition(".")[0]
        projector = model.slots.get(f"{stem}.projector")
        if not isinstance(projector, Projector):
            continue
        features = encoder(**_meta(encoder.dummy_batch()))
        _same(slot, "feature width", encoder.feature_size, features.values.shape[-1])
        tokens = projector(features)
        expected = projector.num_positions(projector.config, features.values.shape[1])
        _same(f"{stem}.projector", "positions per item", expected, tokens.values.shape[1])
        if backbone is not None:
            _same(f"{stem}.projector", "width", backbone.hidden_size, tokens.values.shape[-1])


def _meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _same(slot: str, what: str, declared: int, actual: int) -> None:
    if declared != actual:
        raise CompositionError(f"slot {slot!r}: {what} is {actual}, expected {declared}")
