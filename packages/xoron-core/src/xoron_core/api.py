"""`compose`, `load` and `save`: the three calls most users need."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from xoron_core.components import Part
from xoron_core.composer.composition import Composition, load_factory, read_composition
from xoron_core.composer.parts import build_tokenizer_part, slot_seed, typed_config
from xoron_core.composer.planner import Plan, plan
from xoron_core.configuration import XoronConfig
from xoron_core.delta_loading import open_with_deltas
from xoron_core.folder import write_model
from xoron_core.model import XoronModel
from xoron_core.origins import record_composed
from xoron_core.plugins import Registry, registry
from xoron_core.processor import XoronProcessor
from xoron_core.storage import atomic_folder
from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.template import apply_chat_template_to_tokenizer
from xoron_core.tokens.tokenizer import build_tokenizer


def compose(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    plugins: str | Iterable[str] | None = None,
    preset: str | None = None,
    overrides: Iterable[str] = (),
    seed: int = 0,
) -> tuple[XoronModel, XoronProcessor]:
    """Composes a model from the installed plug-ins.

    Args:
        source: a YAML file, or nested data; None takes the preset alone.
        plugins: plug-ins to choose from, as `--plugins`.
        preset: a composition preset, under the source; `tiny` if neither is given.
        overrides: `a.b=c` items on top.
        seed: for initialisation.

    Returns:
        The model, in fp32 on the CPU (or torch's current device), and its processor.

    Raises:
        XoronError: with what is wrong and the fix.
    """
    chosen = registry().select(plugins)
    composition = read_composition(
        chosen,
        file=str(source) if isinstance(source, str | Path) else None,
        data=source if isinstance(source, Mapping) else None,
        preset=preset,
        overrides=overrides,
    )
    return build(plan(composition, chosen), chosen, seed=seed)


def build(
    planned: Plan, chosen: Registry, *, seed: int = 0, without_source: Container[str] = ()
) -> tuple[XoronModel, XoronProcessor]:
    """Builds what was planned, with weights.

    Args:
        planned: the composition and its token space.
        chosen: the plug-ins to build from.
        seed: for initialisation.
        without_source: slots whose pretrained weights are not loaded, because others follow.
    """
    for name, record in planned.composition.slots.items():
        if record.ref is None and record.kind != "tokenizer" and name not in without_source:
            part_class = load_factory(chosen, chosen.component(record.kind, record.use))
            part_class.find_source(typed_config(chosen, record))
    tokenizer = make_tokenizer(planned.composition, planned.space, chosen)
    config = XoronConfig(composition=planned.composition.data())
    model = XoronModel(config, planned.space, registry=chosen, seed=seed)
    for slot in planned.composition.slots:
        part = model.slots.get(slot)
        if isinstance(part, Part) and slot not in without_source:
            generator = torch.Generator().manual_seed(slot_seed(seed, f"{slot}/new-rows"))
            part.load_source_weights(generator)
    record_composed(config, planned.composition, but=without_source)
    set_control_tokens(model, tokenizer)
    processor = XoronProcessor(
        planned.composition, tokenizer=tokenizer, space=planned.space, registry=chosen
    )
    return model.eval(), processor


def load(
    folder: str | Path, *, deltas: Iterable[str | Path] = (), **kwargs: Any
) -> tuple[XoronModel, XoronProcessor]:
    """Opens a model folder.

    Args:
        folder: as `save` or `xoron compose -o` wrote it.
        deltas: folders as `save_delta` wrote them, to put over it in this order.
        **kwargs: for transformers' `from_pretrained`, e.g. `dtype` or `device_map`.

    Raises:
        XoronError: with what is wrong and the fix; of deltas see `load_delta`.
    """
    if deltas := list(deltas):
        return open_with_deltas(folder, deltas, **kwargs)
    model = XoronModel.from_pretrained(folder, **kwargs)
    return model.eval(), XoronProcessor.from_pretrained(folder)


def save(model: XoronModel, processor: XoronProcessor, folder: str | Path) -> None:
    """Writes a complete model folder, whole or not at all.

    Raises:
        FolderError: if writing fails; an earlier folder is then intact.
    """
    with atomic_folder(folder) as aside:
        write_model(model, aside)
        processor.save_pretrained(aside)


def make_tokenizer(
    composition: Composition, space: TokenSpace | None, chosen: Registry
) -> PreTrainedTokenizerFast | None:
    """Generates the tokenizer of a composition from its token space."""
    for name, slot in composition.of_kind("tokenizer").items():
        base = build_tokenizer_part(chosen, name, slot).base()
        if composition.template == "base":
            return build_tokenizer(cast(TokenSpace, space), base, control="base")
        tokenizer = build_tokenizer(cast(TokenSpace, space), base)
        placeholders = composition.tokens.placeholders
        markers = composition.tokens.markers
        return apply_chat_template_to_tokenizer(
            tokenizer, placeholders=placeholders, markers=markers
        )
    return None


def set_control_tokens(model: XoronModel, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Tells the model's configs which ids begin, end and pad text."""
    if tokenizer is None or model.backbone is None:
        return
    ends = [tokenizer.eos_token_id]
    turn_end = "<|/assistant|>"
    if model.space is not None and turn_end in model.space.special_ids:
        ends.append(model.space.id_of(turn_end))
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
