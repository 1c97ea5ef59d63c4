"""Vocabulary rows of a transformers model: loading them, growing them, drawing new ones.

transformers' own `resize_token_embeddings` draws new rows around the mean of the old ones and knows
nothing of rows that exist but are new in meaning (a checkpoint's padding), so it is not used. Rows
that are to be trained alone start better from `xoron_core.rows.draw_rows`.

Shapes: V rows, D hidden size, R new rows.
"""

from __future__ import annotations

from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from xoron_core.errors import FolderError, UsageError
from xoron_core.nn.split_rows import split_modules

NEW_ROW_STD = 0.02


@torch.no_grad()
def resize_rows(
    model: PreTrainedModel, number: int, *, new_rows: Tensor, generator: torch.Generator
) -> None:
    """Gives embedding and head at least `number` rows and draws the new ones.

    A matrix that has more rows already keeps them. Rows in `new_rows`, and rows that are added, are
    drawn from N(0, 0.02); every other row keeps its value bit for bit. A tied head stays tied, an
    untied one is drawn after the embedding; added elements of a head's bias are zero.

    Args:
        model: a causal language model; its config's vocabulary size follows.
        number: V.
        new_rows: (R,) int64 rows to draw anew.
        generator: of the draws, on any device.

    Raises:
        UsageError: if rows are set apart (`xoron_core.nn.split_rows`).
    """
    if any(True for _ in split_modules(model)):
        raise UsageError("rows of this model are set apart; merge them before resizing")
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    head = cast("nn.Linear | None", model.get_output_embeddings())
    tied = head is not None and head.weight is embedding.weight
    old = embedding.weight.shape[0]
    number = max(number, old)
    added = torch.arange(old, number)
    drawn = torch.cat([new_rows.to("cpu", torch.int64), added]).unique()
    embedding.weight = _redrawn(cast(nn.Parameter, embedding.weight), number, drawn, generator)
    embedding.num_embeddings = number
    if head is not None:
        if tied:
            head.weight = embedding.weight
        else:
            head.weight = _redrawn(cast(nn.Parameter, head.weight), number, drawn, generator)
        head.out_features = number
        if head.bias is not None and head.bias.shape[0] < number:
            bias = head.bias.new_zeros(number)
            bias[: head.bias.shape[0]] = head.bias
            head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
    model.config.get_text_config().vocab_size = number
    for module in (model, model.base_model):
        if hasattr(module, "vocab_size"):
            module.vocab_size = number


def _redrawn(
    weight: nn.Parameter, number: int, drawn: Tensor, generator: torch.Generator
) -> nn.Parameter:
    """The same parameter with rows drawn in place, or a larger one where rows are added."""
    old = weight.shape[0]
    if number > old:
        larger = weight.new_empty(number, weight.shape[1])
        larger[:old] = weight
        weight = nn.Parameter(larger, requires_grad=weight.requires_grad)
    if weight.device.type != "meta":
        values = torch.empty(len(drawn), weight.shape[1], device=generator.device)
        values.normal_(0.0, NEW_ROW_STD, generator=generator)
        weight[drawn.to(weight.device)] = values.to(weight)
    return weight


def load_pretrained(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Opens a causal language model with all its weights.

    Args:
        path: a folder or a Hub name.
        dtype: of the weights.

    Raises:
        FolderError: if it cannot be opened or weights are missing in it.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FolderError(
            f"hf backbone: the weights of {path!r} cannot be loaded ({reason}); give a folder with"
            " config.json and safetensors files, or a Hub name while online"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise FolderError(
            f"hf backbone: {path!r} lacks {len(missing)} weights of {type(model).__name__}, e.g."
            f" {missing[0]}; copy the folder again, whole"
        )
    return cast(PreTrainedModel, model)


@torch.no_grad()
def copy_weights(source: PreTrainedModel, target: PreTrainedModel, path: str) -> None:
    """Copies every weight; embedding and head of the target may have more rows.

    Raises:
        FolderError: if a weight of the target is missing or of another shape.
    """
    theirs = source.state_dict()
    for name, tensor in target.state_dict().items():
        found = theirs.get(name)
        rows = 0 if found is None or found.ndim == 0 else found.shape[0]
        fits = found is not None and (
            found.shape == tensor.shape
            or (found.shape[1:] == tensor.shape[1:] and rows == _rows(source) <= tensor.shape[0])
        )
        if found is None or not fits:
            shape = "nothing" if found is None else tuple(found.shape)
            raise FolderError(
                f"hf backbone: {path!r} has {shape} for {name}, expected {tuple(tensor.shape)}; its"
                " config.json changed since this composition was written, so compose again"
            )
        part = tensor if found.shape == tensor.shape else tensor[:rows]
        part.copy_(found)


def _rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
