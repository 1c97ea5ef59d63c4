"""Puts deltas into models: everything is compared first, then tensors are copied in place.

A slot that the base does not have is composed in from the delta's record, if the base's token space
and the parts around it allow it without a change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from xoron_core import origins
from xoron_core.composer.composition import Composition, Slot
from xoron_core.composer.parts import build_part, typed_config
from xoron_core.composer.planner import plan
from xoron_core.deltas import Delta, read_delta, require_base, require_space
from xoron_core.errors import CompositionError, FolderError, TokenSpaceError, UsageError
from xoron_core.folder import local_folder
from xoron_core.identity import folder_weights, identities, model_weights
from xoron_core.modality_groups import group_names
from xoron_core.model import XoronModel
from xoron_core.nn.split_rows import split_modules
from xoron_core.plugins import Registry
from xoron_core.plugins import registry as installed
from xoron_core.processor import XoronProcessor
from xoron_core.row_deltas import RowDelta, apply_rows, holds_rows, read_rows, replaced

if TYPE_CHECKING:
    from xoron_core.components import Part

_WIDTHS = ("hidden_size", "feature_size", "fusion_layers")


def load_delta(model: XoronModel, folder: str | Path) -> None:
    """Puts a delta's tensors into a model, in place.

    Args:
        model: the base, with the delta's slots in it; hashed as it is in memory.
        folder: as `save_delta` wrote it.

    Raises:
        FolderError: if the delta is damaged or was made over another base, naming the slots.
        TokenSpaceError: if it was made with another token space.
        CompositionError: if a slot is missing, or holds another component or config.
        UsageError: if the delta goes with an adapter.
    """
    delta = read_delta(folder)
    require_no_adapter(delta)
    if lacking := [slot for slot in delta.record.slots if slot not in model.composition.slots]:
        raise CompositionError(
            f"{delta.folder}: this model has no slot {', '.join(lacking)};"
            " xoron_core.load(folder, deltas=[...]) composes it in"
        )
    apply_delta(model, delta)


def open_with_deltas(
    folder: str | Path, deltas: Iterable[str | Path], **kwargs: Any
) -> tuple[XoronModel, XoronProcessor]:
    """Opens a model folder and puts deltas over it, each checked against what stands then.

    The base is hashed as the folder holds it, so `dtype` may round it.

    Args:
        folder: a model folder.
        deltas: folders of deltas, of slots or of rows, in order.
        **kwargs: for `XoronModel.from_pretrained`.

    Raises:
        XoronError: as `load_delta`.
    """
    read = [read_rows(path) if holds_rows(path) else read_delta(path) for path in deltas]
    for delta in read:
        if isinstance(delta, Delta):
            require_no_adapter(delta)
    folder = local_folder(folder, kwargs)
    model = XoronModel.from_pretrained(folder, **kwargs)
    processor = XoronProcessor.from_pretrained(folder)
    stored = {slot for delta in read if (over := delta.record.base) for slot in over.slots}
    weights = folder_weights(folder, sorted(stored & set(model.composition.slots)))
    base = identities(weights)
    for delta in read:
        if isinstance(delta, RowDelta):
            apply_rows(model, delta, weights=weights)
            slot = delta.record.slot
            weights[slot] = replaced(weights[slot], delta)
            base |= identities({slot: weights[slot]})
        else:
            apply_delta(model, delta, base=base, registry=kwargs.get("registry"))
            weights |= delta.tensors
            base |= {slot: record.hash for slot, record in delta.record.slots.items()}
    if model.composition != processor.composition:
        processor = XoronProcessor(
            model.composition, tokenizer=processor.tokenizer, space=processor.space
        )
    return model.eval(), processor


def apply_delta(
    model: XoronModel,
    delta: Delta,
    *,
    base: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> None:
    """Checks that a delta belongs to a model and copies its tensors in.

    Args:
        model: changed in place, or not at all if an error is raised.
        delta: as read.
        base: identities of the model's slots, if known better than from its tensors in memory.
        registry: the plug-ins; None takes the installed ones.

    Raises:
        XoronError: as `load_delta`.
    """
    registry = registry or installed()
    space_hash = None if model.space is None else model.space.hash
    require_space(delta.folder, delta.record.token_space_hash, found=space_hash)
    require_base(delta.folder, delta.record.base, weights=model_weights(model), found=base)
    here = model.composition.slots
    if apart := [name for name in delta.record.slots if _is_split(model, name)]:
        raise UsageError(
            f"{delta.folder}: rows of slot {apart[0]!r} are set apart; call"
            " xoron_core.rows.merge_rows(model) first"
        )
    for name in delta.record.slots.keys() & here.keys():
        _check_component(delta, name, here[name], registry)
        _check_tensors(delta, name, model_weights(model)[name])
    for name in delta.record.slots.keys() - here.keys():
        _add_slot(model, delta, name, registry)
    weights = model_weights(model)
    with torch.no_grad():
        for slot, tensors in delta.tensors.items():
            for name, tensor in tensors.items():
                weights[slot][name].copy_(tensor)
    origins.record(model.config, delta.tensors, "trained")


def require_no_adapter(delta: Delta) -> None:
    """Refuses slots that are only good together with an adapter.

    Raises:
        UsageError: naming what opens both.
    """
    if delta.record.adapter is not None:
        raise UsageError(
            f"{delta.folder}: was trained together with the adapter in"
            f" {delta.record.adapter.file}; open both with xoron_train.load_adapter, or use the"
            " run's merged model"
        )


def _is_split(model: XoronModel, slot: str) -> bool:
    part = model.slots.get(slot)
    return part is not None and any(True for _ in split_modules(part))


def _check_component(delta: Delta, name: str, have: Slot, registry: Registry) -> None:
    """Compares component, config and widths; where weights came from (`path`) is no difference."""
    want = delta.record.slots[name].slot
    if (have.kind, have.use) != (want.kind, want.use):
        raise CompositionError(
            f"{delta.folder}: slot {name!r} holds {have.kind}/{have.use} here, expected"
            f" {want.kind}/{want.use}; compose the base with that component"
        )
    ours, theirs = (typed_config(registry, slot).data() for slot in (have, want))
    ours |= {key: getattr(have, key) for key in _WIDTHS}
    theirs |= {key: getattr(want, key) for key in _WIDTHS}
    keys = [key for key in theirs if key != "path" and ours[key] != theirs[key]]
    if keys:
        raise CompositionError(
            f"{delta.folder}: slot {name!r} is configured otherwise here: "
            + ", ".join(f"{key} is {ours[key]!r}, expected {theirs[key]!r}" for key in keys)
            + "; compose the base with that config"
        )


def _check_tensors(delta: Delta, slot: str, have: Mapping[str, Tensor]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in have.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in delta.tensors[slot].items()}
    if ours != theirs:
        differ = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        first = differ[0]
        raise FolderError(
            f"{delta.folder}: {len(differ)} tensors of slot {slot!r} do not fit, e.g. {first} is"
            f" {ours.get(first, 'not there')} here and {theirs.get(first, 'not there')} in the"
            " delta; use the package versions that it was made with"
        )


def _add_slot(model: XoronModel, delta: Delta, name: str, registry: Registry) -> None:
    """Composes a slot into a model that lacks it.

    The plan on the meta device says whether it fits, before the model is touched.
    """
    slots = {**model.composition.slots, name: delta.record.slots[name].slot}
    wanted = Composition.parse(
        model.composition.data() | {"slots": {n: s.data() for n, s in slots.items()}}
    )
    planned = plan(wanted, registry, lock=model.space)
    if planned.space is not None and planned.space.hash != delta.record.token_space_hash:
        raise TokenSpaceError(
            f"{delta.folder}: composing slot {name!r} in would add ids to this model's token space;"
            " add the slot with `xoron compose --extend`, then apply the delta"
        )
    fitted = planned.composition.slots[name]
    parts = {slot: model.slots.get(slot) for slot in model.composition.slots}
    built = build_part(registry, name, fitted, space=model.space, parts=parts, seed=0)
    part = cast("Part", built)
    part.to(device=model.device, dtype=model.dtype)
    for kept in part.keep_fp32:
        part.get_submodule(kept).float()
    _check_component(delta, name, fitted, registry)
    _check_tensors(delta, name, part.state_dict())
    model.slots.add_module(name.replace(".", "__"), part)
    model.composition = planned.composition
    model.config.composition = planned.composition.data()
    if model.backbone is not None and model.backbone.group_names:
        model.backbone.group_names = group_names(planned.composition)
    model.post_init()
