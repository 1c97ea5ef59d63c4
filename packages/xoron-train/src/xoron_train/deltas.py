"""What a run trains, marked before it starts, and what it writes of it.

    RUN/connector   the trained slots as a delta, with `save_delta`
    RUN/adapter     the adapter in PEFT's format and the slots trained beside it, with `lora`

Both belong to a base and name it; see `xoron_core.deltas`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xoron_core import origins
from xoron_core.deltas import save_delta
from xoron_core.errors import ConfigError
from xoron_core.folder import write_model
from xoron_core.storage import read_tensors, write_tensors
from xoron_train.recipe import Recipe
from xoron_train.selectors import apply_selectors

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_train.lora import Adapter

ADAPTER = "trainer/adapter.safetensors"


class Trained:
    """What a recipe trains of a model, with an adapter attached if it wants one.

    With an adapter, `train` names what is trained whole beside it; nothing if it is empty.

    Args:
        model: changed in place.
        recipe: resolved.

    Attributes:
        parameters: those that are trained, by name.
        adapter: or None.
        slots: those with parameters that are trained whole.

    Raises:
        ConfigError: for selectors that match nothing, for LoRA over random weights, and for a part
            of a slot where a delta would hold it.
    """

    def __init__(self, model: XoronModel, recipe: Recipe) -> None:
        whole: dict[str, nn.Parameter] = {}
        if recipe.lora is None or recipe.train:
            whole = apply_selectors(model, train=recipe.train, freeze=recipe.freeze)
        else:
            model.requires_grad_(False)
        self.model, self.recipe = model, recipe
        self.slots = _slots_of(model, whole)
        if recipe.lora is not None or recipe.save_delta:
            _require_whole(model, whole, self.slots)
        self.adapter: Adapter | None = None
        if recipe.lora is not None:
            from xoron_train import lora  # peft is slow to import

            self.adapter = lora.attach(model, recipe.lora, seed=recipe.seed)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        origins.record(model.config, _mostly(model, whole), "trained")
        self._newest: Path | None = None
        kept = model.parts(nn.Module).keys() - set(self.slots)
        self._buffers = {slot: _buffers(model, slot) for slot in kept}

    def write(self, folder: Path) -> None:
        """Writes the base as a model folder, and the adapter under `trainer/`.

        Slots that have not changed since the last checkpoint are linked from it.
        """
        unchanged = self._unchanged()
        if self.adapter is None:
            write_model(self.model, folder, unchanged=unchanged)
            return
        write_tensors(folder / ADAPTER, self.adapter.tensors())
        with self.adapter.detached():
            write_model(self.model, folder, unchanged=unchanged)

    def written(self, folder: Path) -> None:
        """Notes a complete checkpoint, which later ones may link to."""
        self._newest = folder
        self._buffers = {slot: _buffers(self.model, slot) for slot in self._buffers}

    def resume(self, folder: Path) -> None:
        """Restores the adapter of a checkpoint; the model was loaded from it.

        Raises:
            FolderError: if it does not fit.
        """
        self._newest = folder
        if self.adapter is not None:
            self.adapter.load_tensors(read_tensors(folder / ADAPTER), where=folder / ADAPTER)

    def finish(self, run: Path) -> None:
        """Writes the run's small folders and makes the model a plain one, ready to be saved.

        Raises:
            FolderError: if writing fails.
        """
        if self.adapter is not None and self.recipe.lora is not None:
            self.adapter.save(run / "adapter", slots=self.slots)
            self.adapter.remove(merge=self.recipe.lora.merge)
        elif self.recipe.save_delta:
            save_delta(self.model, run / "connector", slots=self.slots)

    def _unchanged(self) -> dict[str, Path]:
        """Untrained slots, and the checkpoint that holds them as they are.

        Their parameters stay bit for bit; buffers are compared, since a part may change them
        outside the gradient.
        """
        if self._newest is None:
            return {}
        return {
            slot: self._newest
            for slot, before in self._buffers.items()
            if all(torch.equal(now, before[n]) for n, now in _buffers(self.model, slot).items())
        }


def _buffers(model: XoronModel, slot: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.part(slot).named_buffers()}


def _slots_of(model: XoronModel, trained: Mapping[str, nn.Parameter]) -> list[str]:
    modules = {name.split(".")[1] for name in trained}
    return [slot for slot in model.composition.slots if slot.replace(".", "__") in modules]


def _mostly(model: XoronModel, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Slots of which a run trains at least half; noise with trained norms is still noise."""
    moving = {id(parameter) for parameter in trained.values()}
    found = []
    for slot, part in model.parts(nn.Module).items():
        sizes = {id(p): p.numel() for p in part.parameters()}
        if sizes and 2 * sum(sizes[key] for key in moving & sizes.keys()) >= sum(sizes.values()):
            found.append(slot)
    return found


def _require_whole(
    model: XoronModel, trained: Mapping[str, nn.Parameter], slots: list[str]
) -> None:
    for slot in slots:
        own = {id(parameter) for parameter in model.part(slot).parameters()}
        chosen = own & {id(parameter) for parameter in trained.values()}
        if chosen != own:
            raise ConfigError(
                f"a delta holds whole slots, and train selects {len(chosen)} of the {len(own)}"
                f" parameters of slot {slot!r}; name the slot, or set save_delta: false and no lora"
            )
