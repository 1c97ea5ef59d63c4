"""What a run trains, marked before it starts, and what it writes of it.

    RUN/rows        the trained vocabulary rows, with `rows`
    RUN/connector   the trained slots as a delta, with `save_delta`
    RUN/adapter     the adapter in PEFT's format and the slots trained beside it, with `lora`

All of them belong to a base and name it; see `xoron_core.row_deltas` and `xoron_core.deltas`. The
base of an adapter or a connector has the trained rows: put `RUN/rows` in first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xoron_core import origins
from xoron_core.components import Loss
from xoron_core.deltas import save_delta
from xoron_core.errors import ConfigError, FolderError
from xoron_core.folder import write_model
from xoron_core.row_deltas import save_rows
from xoron_core.rows import draw_rows, merge_rows, new_rows, separate
from xoron_core.storage import read_tensors, write_tensors
from xoron_train.alone import media_slots, one_kind, require_judges, slots_of
from xoron_train.recipe import Recipe
from xoron_train.selectors import apply_selectors

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor
    from xoron_train.lora import Adapter

ADAPTER = "trainer/adapter.safetensors"
LOSSES = "trainer/losses.safetensors"
ROWS = "trainer/rows.safetensors"


class Trained:
    """What a recipe trains of a model, with an adapter and rows of their own if it wants them.

    With an adapter or rows, `train` names what is trained whole beside them; empty, nothing is.

    Args:
        model: changed in place.
        recipe: resolved.
        processor: encodes the descriptions that rows start from.
        fresh: whether the run begins; else `resume` is called next, and no row is drawn.

    Attributes:
        parameters: those that are trained, by name.
        adapter: or None.
        slots: those with parameters that are trained whole, losses left out.
        judges: losses with parameters that are trained.
        media_slots: what is trained on media alone; then nothing else is, but for the judges.
        rows: parameters of vocabulary rows that are trained apart, by name.

    Raises:
        ConfigError: for selectors that match nothing or what cannot learn together, for LoRA over
            random weights, and for a part of a slot where a delta would hold it.
    """

    def __init__(
        self,
        model: XoronModel,
        recipe: Recipe,
        *,
        processor: XoronProcessor | None = None,
        fresh: bool = True,
    ) -> None:
        self.model, self.recipe = model, recipe
        learning = [s for s, p in model.parts(Loss).items() if _learns(p)]
        if recipe.rows is not None:
            _start_rows(model, recipe, processor, fresh=fresh)
        whole = self._whole()
        slots = slots_of(model, whole)
        self.judges = [slot for slot in slots if isinstance(model.part(slot), Loss)]
        self.slots = [slot for slot in slots if slot not in self.judges]
        self.media_slots = media_slots(model, self.slots)
        if self.media_slots and recipe.train:
            require_judges(model, recipe, trained=slots, learning=learning)
        if recipe.lora is not None or recipe.save_delta:
            _require_whole(model, whole, self.slots)
        self.adapter: Adapter | None = None
        if recipe.lora is not None:
            from xoron_train import lora  # peft is slow to import

            self.adapter = lora.attach(model, recipe.lora, seed=recipe.seed)
        # Last: what looks for plain matrices has done so.
        self.rows = {} if recipe.rows is None else separate(model)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        origins.record(model.config, _mostly(model, whole), "trained")
        self._newest: Path | None = None
        moving = {*self.slots, *([model.need_backbone().slot] if self.rows else [])}
        kept = model.parts(nn.Module).keys() - moving
        self._buffers = {slot: _buffers(model, slot) for slot in kept}

    def write(self, folder: Path) -> None:
        """Writes the base as a model folder, and what it cannot hold under `trainer/`.

        Slots that have not changed since the last checkpoint are linked from it.
        """
        unchanged = self._unchanged()
        for file, tensors in ((LOSSES, self._judged()), (ROWS, self.rows)):
            if tensors:
                write_tensors(folder / file, dict(tensors))
        if self.adapter is not None:
            write_tensors(folder / ADAPTER, self.adapter.tensors())
        with self._base():
            write_model(self.model, folder, unchanged=unchanged)

    def written(self, folder: Path) -> None:
        """Notes a complete checkpoint, which later ones may link to."""
        self._newest = folder
        self._buffers = {slot: _buffers(self.model, slot) for slot in self._buffers}

    def resume(self, folder: Path) -> None:
        """Restores the adapter, losses and rows of a checkpoint; the model was loaded from it.

        Raises:
            FolderError: if they do not fit.
        """
        self._newest = folder
        for file, tensors in ((LOSSES, self._judged()), (ROWS, self.rows)):
            if tensors:
                _restore(tensors, folder / file)
        if self.adapter is not None:
            self.adapter.load_tensors(read_tensors(folder / ADAPTER), where=folder / ADAPTER)

    def finish(self, run: Path) -> None:
        """Writes the run's small folders and makes the model a plain one, ready to be saved.

        Raises:
            FolderError: if writing fails.
        """
        if self.rows:
            with self._base():
                save_rows(self.model, run / "rows")
        if self.adapter is not None and self.recipe.lora is not None:
            self.adapter.save(run / "adapter", slots=self.slots)
            self.adapter.remove(merge=self.recipe.lora.merge)
        elif self.recipe.save_delta and self.slots:
            save_delta(self.model, run / "connector", slots=self.slots)
        merge_rows(self.model)

    def _whole(self) -> dict[str, nn.Parameter]:
        """What is trained whole; the rest is frozen."""
        model, recipe = self.model, self.recipe
        in_part = recipe.lora is not None or recipe.rows is not None
        if in_part and not recipe.train:
            model.requires_grad_(False)
            return {}
        selected = apply_selectors(model, train=recipe.train, freeze=recipe.freeze)
        beside = [model.need_backbone().slot] if in_part else []
        return one_kind(model, selected, named=bool(recipe.train), beside=beside)

    def _base(self) -> contextlib.AbstractContextManager[None]:
        """The model without its adapter, for a while."""
        return contextlib.nullcontext() if self.adapter is None else self.adapter.detached()

    def _judged(self) -> dict[str, Tensor]:
        """The tensors of trained losses, which no model folder has."""
        return {
            f"{slot}.{name}": tensor
            for slot in self.judges
            for name, tensor in self.model.part(slot).state_dict().items()
        }

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


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _start_rows(
    model: XoronModel, recipe: Recipe, processor: XoronProcessor | None, *, fresh: bool
) -> None:
    """Draws the new rows of a run that begins.

    Raises:
        ConfigError: if the model has no new rows.
    """
    assert recipe.rows is not None
    if model.backbone is None or not len(new_rows(model)):
        raise ConfigError(
            "rows: this model has no rows beside those of its text: neither special tokens nor a"
            " codec; add one with xoron compose --extend, or remove rows from the recipe"
        )
    if fresh and recipe.rows.start != "keep":
        draw_rows(
            model,
            processor,
            descriptions=recipe.rows.descriptions,
            noise=recipe.rows.noise,
            seed=recipe.seed,
        )


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copies a file's tensors into these, in place.

    Raises:
        FolderError: if names or shapes differ.
    """
    found = read_tensors(file)
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if differ := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
        raise FolderError(
            f"{file}: {len(differ)} tensors do not fit, e.g. {differ[0]} is"
            f" {theirs.get(differ[0], 'not there')}, expected {ours.get(differ[0], 'nothing')};"
            " resume with the recipe and model that it was written with"
        )
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def _buffers(model: XoronModel, slot: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.part(slot).named_buffers()}


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
