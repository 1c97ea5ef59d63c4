"""Models under another token space: vocabulary rows carried over by name.

Three uses. `migrate` gives a model the space of another one, so that the two can be combined;
`migrate_rows` does it with a row delta, for the migrated base.
`extend` composes further parts into a model folder: its ids stay where they are, what is new is
appended. Either way a row goes with the name of what it means, and a row whose name is new is drawn
as a fresh model of that seed would draw it.

Footguns:
- Text bases are never translated into each other: the two spaces must have the same one.
- Rows behind the space, a checkpoint's padding, mean nothing and are carried over where both have
  them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from xoron_core.api import build, load, make_tokenizer, set_control_tokens
from xoron_core.components import Backbone
from xoron_core.composer.planner import Plan
from xoron_core.configuration import XoronConfig
from xoron_core.errors import TokenSpaceError, UsageError
from xoron_core.model import XoronModel
from xoron_core.origins import origins, record
from xoron_core.plugins import Registry
from xoron_core.plugins import registry as installed
from xoron_core.processor import XoronProcessor
from xoron_core.row_deltas import apply_rows, read_rows, save_rows
from xoron_core.tokens.difference import entries
from xoron_core.tokens.space import TokenSpace


def row_sources(old: TokenSpace, new: TokenSpace) -> Tensor:
    """Where each row of a new space stands in an old one.

    Returns:
        (R,) int64 over the rows of `new`: the old row of the same name, or -1.

    Raises:
        TokenSpaceError: if a name means something else in the two.
    """
    before, after = entries(old), entries(new)
    sources = torch.full((new.size,), -1)
    for name, entry in after.items():
        if (other := before.get(name)) is None:
            continue
        if other.meaning != entry.meaning:
            raise TokenSpaceError(
                f"{name!r} does not mean the same in the two token spaces, so its rows cannot be"
                " carried over; `xoron tokens diff` shows what changed"
            )
        sources[entry.start : entry.start + entry.size] = torch.arange(
            other.start, other.start + other.size
        )
    return sources


def migrate(
    model: XoronModel, processor: XoronProcessor, space: TokenSpace, *, seed: int = 0
) -> tuple[XoronModel, XoronProcessor]:
    """The same model with its vocabulary rows where another space has them.

    Logits of what both spaces name are the same numbers.

    Args:
        model: not changed.
        processor: of the model.
        space: the one to move to. It must have the model's text base and all that the model's
            composition uses.
        seed: for rows that are new.

    Raises:
        TokenSpaceError: if the spaces do not fit, naming what does not.
    """
    old = _space_of(model)
    if lacking := [name for name in entries(old) if name not in entries(space)]:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise TokenSpaceError(
            f"the target token space lacks {', '.join(lacking[:5])}{more}, which this model has;"
            " migrate to a space that has them, e.g. one composed with --extend"
        )
    sources = row_sources(old, space)
    config = XoronConfig(composition=model.composition.data())
    moved = XoronModel(config, space, seed=seed).to(model.dtype)
    for slot in moved.composition.slots:
        if isinstance(part := moved.slots.get(slot), nn.Module):
            _carry_over(model.slots.get(slot), part, sources, old.size)
    _carry_origins(model, moved)
    registry = installed()
    tokenizer = make_tokenizer(model.composition, space, registry)
    set_control_tokens(moved, tokenizer)
    return moved.eval(), XoronProcessor(
        processor.composition, tokenizer=tokenizer, space=space, registry=registry
    )


def migrate_rows(
    model: XoronModel,
    processor: XoronProcessor,
    folder: str | Path,
    *,
    space: TokenSpace,
    output: str | Path,
    seed: int = 0,
) -> tuple[XoronModel, XoronProcessor]:
    """Moves a row delta to another token space: its rows stand where that space has their names.

    Rows of holes and of padding have no name and are left behind.

    Args:
        model: the delta's base, under the token space that the delta was made with; the delta's
            rows are put into it.
        processor: of the model.
        folder: the row delta.
        space: the one to move to, as for `migrate`.
        output: folder of the moved delta. Its base is `migrate(base, processor, space, seed=seed)`.
        seed: for rows that are new to the space and not the delta's.

    Returns:
        The migrated model with the rows in it, and its processor.

    Raises:
        FolderError: if the delta is damaged or was made over another base.
        TokenSpaceError: if the spaces do not fit, naming what does not.
        UsageError: if none of the delta's rows has a name in the space.
    """
    delta = read_rows(folder)
    sources = row_sources(_space_of(model), space)
    ids = torch.isin(sources, delta.record.ids()).nonzero().flatten()
    if not len(ids):
        raise UsageError(
            f"{folder}: none of its rows has a name in {space.hash}, so there is nothing to move"
        )
    apply_rows(model, delta)
    moved, its_processor = migrate(model, processor, space, seed=seed)
    save_rows(moved, output, ids=ids)
    return moved, its_processor


def extend(
    folder: str | Path, planned: Plan, registry: Registry, *, seed: int = 0
) -> tuple[XoronModel, XoronProcessor]:
    """Builds a model folder with further parts: its weights, and new ones for what is added.

    Args:
        folder: a model folder.
        planned: of a composition read with the folder's as `base`, under its token space as lock.
        registry: the plug-ins it was planned with.
        seed: for what is new.

    Raises:
        FolderError: if the folder cannot be opened.
    """
    old, _ = load(folder)
    model, processor = build(planned, registry, seed=seed, without_source=old.composition.slots)
    rows = 0 if old.space is None else old.space.size
    sources = torch.arange(rows)
    if old.space is not None and planned.space is not None:
        sources = row_sources(old.space, planned.space)
    for slot in old.composition.slots:
        if isinstance(part := old.slots.get(slot), nn.Module):
            _carry_over(part, model.slots.get(slot), sources, rows)
    _carry_origins(old, model)
    return model, processor


def _space_of(model: XoronModel) -> TokenSpace:
    if model.space is None:
        raise TokenSpaceError("this model has no token space, so there is nothing to migrate")
    return model.space


def _carry_origins(old: XoronModel, new: XoronModel) -> None:
    for slot, origin in origins(old.config).items():
        record(new.config, [slot], origin)


@torch.no_grad()
def _carry_over(old: nn.Module, new: nn.Module, sources: Tensor, old_size: int) -> None:
    """Copies a part's state; vocabulary matrices row by row."""
    theirs = old.state_dict(keep_vars=True)
    vocabulary = {id(tensor) for tensor in _vocabulary(old)}
    for name, target in new.state_dict(keep_vars=True).items():
        source = theirs[name]
        if id(source) not in vocabulary:
            target.copy_(source)
            continue
        kept = sources >= 0
        rows = kept.nonzero().flatten().to(target.device)
        target[rows] = source[sources[kept].to(source.device)].to(target)
        last = min(len(source), len(target))
        padding = slice(min(max(old_size, len(sources)), last), last)
        target[padding] = source[padding].to(target)


def _vocabulary(part: nn.Module) -> list[Tensor]:
    """The tensors of a backbone whose first axis is the vocabulary."""
    if not isinstance(part, Backbone):
        return []
    modules = (part.model.get_input_embeddings(), part.model.get_output_embeddings())
    return [tensor for module in modules if module is not None for tensor in module.parameters()]
