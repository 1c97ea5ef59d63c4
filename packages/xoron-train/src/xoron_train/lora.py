"""LoRA on the backbone (Hu et al. 2021), by `peft`: what it adapts, how it is saved, when it goes.

`RUN/adapter` is a folder in PEFT's own format, which `peft.PeftModel.from_pretrained` opens on the
bare transformers backbone, and a xoron delta at once: it names the base it belongs to, and holds
the slots that were trained beside it.

Footguns:
- Parameters of adapted layers are called `...base_layer.weight` while the adapter is attached. To
  save or hash the base, do it inside `Adapter.detached()`.
- PEFT freezes everything else in the backbone; slots beside it are not touched.
- Routers are no linear layers here and stay as they are; the linear layers of experts are adapted.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from xoron_core import origins
from xoron_core.delta_loading import apply_delta
from xoron_core.deltas import Adapter as AdapterRecord
from xoron_core.deltas import read_delta, write_delta
from xoron_core.errors import ConfigError, FolderError
from xoron_core.identity import identities
from xoron_core.storage import atomic_folder, read_tensors, write_tensors
from xoron_train.selectors import linear_layers

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_train.recipe import LoraRecipe

logger = logging.getLogger("xoron.train")

WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # what PeftModel calls the model it wraps


class Adapter:
    """A LoRA adapter, attached to the backbone of a model.

    Args:
        model: changed in place: adapted layers are replaced by layers around them.
        config: PEFT's; its `target_modules` are names below the backbone's transformers model.
    """

    def __init__(self, model: XoronModel, config: peft.LoraConfig) -> None:
        self.model = model
        self.config = config
        # PEFT makes it a set, whose order in a file would be another each time.
        config.target_modules = sorted(config.target_modules or ())
        self.wrapped: nn.Module = model.need_backbone().model
        own = copy.deepcopy(config)  # PEFT shortens the list in the config that it is given
        peft.inject_adapter_in_model(own, self.wrapped)
        modules = self.wrapped.named_modules()
        self.layers = {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}
        assert set(self.layers) == set(config.target_modules), "PEFT adapts other layers"
        self.wrapped.train(self.wrapped.training)  # new layers start in training mode

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's own tensors, named as in PEFT's files below its prefix."""
        state = peft.get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        return {name: tensor.detach() for name, tensor in state.items()}

    def load_tensors(self, tensors: dict[str, Tensor], *, where: str | Path) -> None:
        """Puts in what `tensors` gave.

        Raises:
            FolderError: if names or shapes do not fit.
        """
        ours = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if differ := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
            raise FolderError(
                f"{where}: {len(differ)} tensors do not fit the adapter, e.g. {differ[0]} is"
                f" {theirs.get(differ[0], 'not there')}, expected"
                f" {ours.get(differ[0], 'nothing of that name')}; use the recipe and model that it"
                " was written with"
            )
        peft.set_peft_model_state_dict(self.wrapped, tensors)

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """Takes the adapter out of the model for a while, which then is its plain base."""
        self._place({name: layer.get_base_layer() for name, layer in self.layers.items()})
        try:
            yield
        finally:
            self._place(self.layers)

    def remove(self, *, merge: bool) -> None:
        """Makes the model a plain one for good, with the adapter added to its weights or not."""
        if merge:
            for layer in self.layers.values():
                layer.merge(safe_merge=True)
            origins.record(self.model.config, [self.model.need_backbone().slot], "trained")
        self._place({name: layer.get_base_layer() for name, layer in self.layers.items()})
        del self.wrapped.peft_config

    def save(self, folder: str | Path, *, slots: Iterable[str] = ()) -> None:
        """Writes the adapter and the slots that were trained beside it, whole or not at all.

        Args:
            folder: where to write.
            slots: trained whole.

        Raises:
            FolderError: if writing fails.
        """
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        record = AdapterRecord(file=WEIGHTS, hash=identities({"adapter": tensors})["adapter"])
        with atomic_folder(folder) as aside, self.detached():
            self.config.save_pretrained(str(aside))
            named = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
            write_tensors(aside / WEIGHTS, named)
            write_delta(self.model, aside, slots=slots, adapter=record)

    def _place(self, layers: dict[str, Any]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.wrapped.get_submodule(parent), child, layer)


def attach(model: XoronModel, lora: LoraRecipe, *, seed: int) -> Adapter:
    """Attaches a fresh adapter, whose output is zero until it is trained.

    Args:
        model: changed in place: of the backbone, only the adapter requires a gradient then.
        lora: what to adapt, and how.
        seed: of the adapter's weights.

    Raises:
        ConfigError: for a selector that matches no linear layer, for a layer that is trained whole,
            and over random weights.
    """
    _require_known_weights(model)
    layers = linear_layers(model, lora.targets)
    _require_apart(model, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapter(model, _peft_config(model, lora, layers))


def load_adapter(model: XoronModel, folder: str | Path) -> Adapter:
    """Attaches a run's adapter to its base, and puts in the slots that were trained beside it.

    Args:
        model: the base that the run was started with, in fp32 or as its folder holds it.
        folder: `RUN/adapter`.

    Returns:
        The adapter; `remove(merge=True)` adds it to the weights.

    Raises:
        FolderError: if the adapter is damaged or was trained over another base.
        TokenSpaceError, CompositionError: as `xoron_core.load_delta`.
    """
    delta = read_delta(folder)
    record = delta.record.adapter
    if record is None:
        raise FolderError(f"{folder}: holds no adapter; open it with xoron_core.load_delta")
    file = delta.folder / record.file
    tensors = {n.removeprefix(_PEFT_PREFIX): t for n, t in read_tensors(file).items()}
    if identities({"adapter": tensors})["adapter"] != record.hash:
        raise FolderError(f"{file}: was changed or is damaged; copy the adapter again, whole")
    apply_delta(model, delta)
    config = peft.LoraConfig.from_pretrained(str(delta.folder))
    adapter = Adapter(model, config)
    adapter.load_tensors(tensors, where=file)
    return adapter


def _peft_config(model: XoronModel, lora: LoraRecipe, layers: Iterable[str]) -> peft.LoraConfig:
    slot = model.composition.slots[model.need_backbone().slot]
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=sorted(layers),
        base_model_name_or_path=slot.config.get("path"),
        task_type="CAUSAL_LM",
        inference_mode=False,
    )


def _require_known_weights(model: XoronModel) -> None:
    slot = model.need_backbone().slot
    origin = origins.origins(model.config).get(slot)
    if origin == "random":
        raise ConfigError(
            f"lora: the weights of slot {slot!r} are random, and LoRA would freeze this noise."
            f" Compose it over pretrained weights ({slot}.use=hf {slot}.path=...), or train it"
            " whole first"
        )
    if origin is None:
        logger.warning(
            "lora: this model folder does not say where the weights of slot %r come from; over"
            " random ones LoRA would freeze noise",
            slot,
        )


def _require_apart(model: XoronModel, layers: Iterable[str]) -> None:
    """A layer is trained whole or by an adapter, not both: its base could not stay as it is."""
    adapted = {name: model.need_backbone().model.get_submodule(name) for name in layers}
    both = [n for n, m in adapted.items() if any(p.requires_grad for p in m.parameters())]
    if both:
        raise ConfigError(
            f"train names {len(both)} layers that lora adapts, e.g. {both[0]}; take them out of"
            " train, or set lora.targets to other layers"
        )
