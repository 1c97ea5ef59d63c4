"""Training new vocabulary rows alone: which they are, how they start, how they are set apart.

    draw_rows(model, processor, descriptions={"image-begin": "the start of an image"})
    separate(model)      # only these rows now have a gradient and optimizer states
    ...                  # train, save, generate: the model is used as before
    save_rows(model, "rows")
    merge_rows(model)    # an ordinary model again

Set-apart rows work as `xoron_core.nn.split_rows` says; `row_deltas` hands them around.

Footgun: `separate` freezes the two vocabulary matrices and touches nothing else: whatever else
requires a gradient is still trained.

Shapes: V rows of the matrices, R trained rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from xoron_core.errors import TokenSpaceError, UsageError
from xoron_core.nn.split_rows import merge, split, split_modules, vocabulary

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

# Small beside the spread of old rows: a new id starts about as likely as the average one, and no
# old id loses probability to it (Hewitt 2021, "Initializing New Word Embeddings").
NOISE = 0.1
_BLOCK = 8192


def new_rows(model: XoronModel) -> Tensor:
    """The rows that a text base does not have: special tokens and codecs, holes included.

    Returns:
        (R,) int64, ascending.

    Raises:
        TokenSpaceError: if the model has no token space.
    """
    if model.space is None:
        raise TokenSpaceError("this model has no token space, so no rows are new; name their ids")
    return model.space.new_rows(model.space.text_size)


def separate(
    model: XoronModel, ids: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, nn.Parameter]:
    """Sets rows of embedding and head apart, in place, so that they train alone.

    The same rows of both, tied or not. The model computes, saves and generates as before.

    Args:
        model: a composed model with a backbone.
        ids: (R,) int64, or None for `new_rows`.
        dtype: of the trained rows, or None for the matrices'.

    Returns:
        The parameters to train, by their names in the model: one if the head is tied, else two.

    Raises:
        UsageError: for ids that are no rows, or a model whose rows are apart already.
        CompositionError: if the backbone's embedding or head is no plain matrix.
    """
    backbone = model.need_backbone()
    chosen = new_rows(model) if ids is None else ids
    made = {id(parameter) for parameter in split(backbone.model, chosen, dtype=dtype)}
    return {name: p for name, p in model.named_parameters() if id(p) in made}


def merge_rows(model: XoronModel) -> None:
    """Puts rows that were set apart back into their matrices, which stay frozen."""
    merge(model)


def separate_ids(model: XoronModel) -> Tensor | None:
    """The (R,) ids of the rows that are set apart, or None."""
    return next((module.row_ids for module in split_modules(model)), None)


@torch.no_grad()
def draw_rows(
    model: XoronModel,
    processor: XoronProcessor | None = None,
    *,
    ids: Tensor | None = None,
    descriptions: Mapping[str, str] | None = None,
    noise: float = NOISE,
    seed: int = 0,
) -> None:
    """Draws rows anew, in place: the mean of old rows plus noise, so that no two are equal.

    Embedding and head each have their own mean. The noise of every column has `noise` times the
    standard deviation of the old rows there.

    Args:
        model: not set apart.
        processor: encodes descriptions; not needed without.
        ids: (R,) int64, or None for `new_rows`. Old rows are those of the text base that are not
            among them, or of everything else where there is no text.
        descriptions: by name of a special token or of a codec range: text whose tokens' mean its
            rows start from instead of the mean of all.
        noise: above 0.
        seed: of the noise.

    Raises:
        UsageError: if the noise is not above 0, rows are set apart, there are no old rows, or a
            description is empty or of rows that are not drawn.
        TokenSpaceError: for a name that the token space does not have.
    """
    if not noise > 0:
        raise UsageError(f"noise: expected more than 0, got {noise}: rows would be equal")
    if separate_ids(model) is not None:
        raise UsageError("these rows are set apart already; draw them before `separate`")
    ids = (new_rows(model) if ids is None else ids).to("cpu", torch.int64).unique()
    described = _described(model, processor, ids, descriptions or {})
    generator = torch.Generator().manual_seed(seed)
    matrices = {id(m.weight): m.weight for m in vocabulary(model.need_backbone().model)}
    for weight in cast("Iterable[Tensor]", matrices.values()):
        mean, spread = _mean_and_spread(weight, _old_rows(model, ids, len(weight)))
        values = torch.randn(len(ids), weight.shape[1], generator=generator)
        values = mean + noise * spread * values
        for chosen, tokens in described:
            words = weight[tokens.to(weight.device)].mean(0, dtype=torch.float32)
            values[chosen] += words.cpu() - mean
        weight[ids.to(weight.device)] = values.to(weight)


def _mean_and_spread(weight: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of some rows, in fp32 on the CPU, block by block."""
    blocks = old.to(weight.device).split(_BLOCK)
    mean = torch.stack([weight[block].sum(0, dtype=torch.float32) for block in blocks]).sum(0)
    mean = mean / len(old)
    squares = [(weight[block].float() - mean).square().sum(0) for block in blocks]
    spread = (torch.stack(squares).sum(0) / len(old)).sqrt()
    if not bool(spread.any()):
        raise UsageError(
            "the old rows are all equal, and noise of their spread would be none; train them first"
        )
    return mean.cpu(), spread.cpu()


def _old_rows(model: XoronModel, ids: Tensor, rows: int) -> Tensor:
    size = model.space.text_size or model.space.size if model.space is not None else rows
    old = torch.ones(rows, dtype=torch.bool)
    old[size:] = False
    old[ids] = False
    if not bool(old.any()):
        raise UsageError("every row would be drawn, and there is no old one to take the mean of")
    return old.nonzero().flatten()


def _described(
    model: XoronModel,
    processor: XoronProcessor | None,
    ids: Tensor,
    descriptions: Mapping[str, str],
) -> list[tuple[Tensor, Tensor]]:
    """Per description: which of `ids` it is of, and the (N,) tokens of its text."""
    found = []
    for name, text in descriptions.items():
        if model.space is None or processor is None:
            raise UsageError("descriptions need a model with a token space, and its processor")
        rows = _named(model, name)
        chosen = torch.isin(ids, rows).nonzero().flatten()
        if len(chosen) != len(rows):
            raise UsageError(
                f"descriptions: {name!r} is of rows {int(rows[0])} .. {int(rows[-1])}, which are"
                " not all drawn; leave it out, or name their ids"
            )
        tokens = torch.tensor(processor.encode_text(text), dtype=torch.int64)
        if not len(tokens) or bool(torch.isin(tokens, ids).any()):
            raise UsageError(
                f"descriptions: the text of {name!r} is {text!r}; expected words of the text base"
            )
        found.append((chosen, tokens))
    return found


def _named(model: XoronModel, name: str) -> Tensor:
    assert model.space is not None
    for one in model.space.ranges:
        if one.name == name and one.kind == "codec" and not one.removed:
            return torch.arange(one.start, one.stop)
    return torch.tensor([model.space.id_of(name)])
