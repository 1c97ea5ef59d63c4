"""Vocabulary matrices of which only some rows are trained: embedding and head, tied or not.

A split module keeps its matrix, frozen, and holds beside it one parameter with the rows that are
trained. The matrix is the merged one: the trained rows are written into it before each use, which
costs a copy of those rows and no copy of the matrix. So values are those of an ordinary module bit
for bit, `state_dict` has the names and shapes of one, and tied heads, generation and adapters see
nothing else. Gradients and optimizer states have the size of the trained rows; no gradient of the
whole matrix is ever made.

Footguns:
- `module.weight` is brought up to date when it is read. A reference that is held goes stale with
  the next optimizer step, and gives no gradient to the trained rows.
- Only plain `nn.Embedding` and `nn.Linear` are split: others compute something of their own.
- A head's bias is not trained.
- `rows` in a wider dtype than the matrix are rounded where they are used and where they are saved.

Shapes: (...) any, V rows of the matrix, R trained rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xoron_core.errors import CompositionError, UsageError

ROWS = "rows"


class _SplitRows(nn.Module):
    """What both kinds share. Made by `split`, never by a constructor.

    Attributes:
        rows: (R, D), trained.
        row_ids: (R,) int64, ascending: where they stand in the matrix.
    """

    rows: nn.Parameter
    row_ids: Tensor

    @property
    def weight(self) -> nn.Parameter:
        """(V, D), merged at the time of reading; without gradient."""
        self._merge()
        return cast(nn.Parameter, self._parameters["weight"])

    @torch.no_grad()
    def _merge(self) -> None:
        """Writes the trained rows into the matrix."""
        # Through `.data`: a pending backward pass has saved the matrix, and what it reads of these
        # rows is what they are again now. Autograd would take the write for a change.
        weight, rows = cast(Tensor, self._parameters["weight"]).data, self.rows.data
        if not weight.is_meta:
            _write_rows(weight, self.row_ids, rows)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._merge()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + ROWS]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (found := state_dict.get(prefix + "weight")) is not None:
            state_dict[prefix + ROWS] = found[self.row_ids.to(found.device)]
        super()._load_from_state_dict(state_dict, prefix, *args)


class SplitEmbedding(_SplitRows, nn.Embedding):  # type: ignore[misc]  # `weight` is read-only
    """An embedding with trained rows."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) int64 to (..., D)."""
        matrix = cast(Tensor, self._parameters["weight"])
        place = torch.searchsorted(self.row_ids, input).clamp(max=len(self.row_ids) - 1)
        trained = (self.row_ids[place] == input).unsqueeze(-1)
        new = F.embedding(place, self.rows).to(matrix.dtype)
        return torch.where(trained, new, F.embedding(input, matrix))


class SplitLinear(_SplitRows, nn.Linear):  # type: ignore[misc]  # `weight` is read-only
    """A head with trained rows."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        matrix, device = cast(Tensor, self.weight), input.device.type
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            bias = None if bias is None else bias.to(dtype)
            input, matrix = input.to(dtype), matrix.to(dtype)
        return cast(Tensor, _MergedLinear.apply(input, self.rows, matrix, bias, self.row_ids))

    def rows_between(self, start: int, stop: int) -> Tensor:
        """(stop - start, D): these rows of the matrix, the trained ones with their gradient."""
        first, last = torch.searchsorted(
            self.row_ids, self.row_ids.new_tensor([start, stop])
        ).tolist()
        trained = self.rows[first:last].to(self.weight.dtype)
        if last - first == stop - start:
            return trained
        return self.weight[start:stop].index_copy(0, self.row_ids[first:last] - start, trained)


class _MergedLinear(torch.autograd.Function):
    """The product with the merged matrix; backward gives the trained rows theirs alone."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None, ids: Tensor
    ) -> Tensor:
        # `rows` is saved only so that autograd notices if it changes before the backward pass.
        ctx.save_for_backward(input, rows, matrix, ids)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, rows, matrix, ids = ctx.saved_tensors
        grad_input = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ matrix
        if ctx.needs_input_grad[1]:
            chosen = grad.reshape(-1, grad.shape[-1])[:, ids]
            grad_rows = (chosen.t() @ input.reshape(-1, input.shape[-1])).to(rows.dtype)
        return grad_input, grad_rows, None, None, None


_PLAIN: dict[type, type[_SplitRows]] = {nn.Embedding: SplitEmbedding, nn.Linear: SplitLinear}


def split(model: Any, ids: Tensor, *, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    """Splits embedding and head of a causal language model, in place.

    Args:
        model: has `get_input_embeddings` and `get_output_embeddings`, as transformers' models. A
            head tied to the embedding stays tied: both share one parameter.
        ids: (R,) int64, the rows to train, in any order.
        dtype: of the trained rows, or None for the matrix's. fp32 over half-precision weights keeps
            small updates.

    Returns:
        The new parameters: one if the head is tied, else embedding's and head's. The matrices, and
        a head's bias, are frozen.

    Raises:
        UsageError: for no ids, ids that are no rows, or a model that is split already.
        CompositionError: if its embedding or head is no plain one.
    """
    modules = vocabulary(model)
    for module in modules:
        _check(module, ids)
    ids = ids.to("cpu", torch.int64).unique()
    parameters: dict[int, nn.Parameter] = {}
    for module in modules:
        weight = cast(nn.Parameter, module._parameters["weight"])
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if id(weight) not in parameters:
            rows = weight.detach()[ids.to(weight.device)].to(dtype or weight.dtype)
            parameters[id(weight)] = nn.Parameter(rows)
        # The class changes and the object stays, so that hooks and references to it hold.
        module.__class__ = _PLAIN[type(module)]
        module.register_parameter(ROWS, parameters[id(weight)])
        module.register_buffer("row_ids", ids.to(weight.device), persistent=False)
    return list(parameters.values())


def merge(model: Any) -> None:
    """Makes split modules ordinary ones again, with the trained rows in their matrices.

    Matrices stay frozen; a model that is not split is left alone.
    """
    plain = {kind: origin for origin, kind in _PLAIN.items()}
    for module in split_modules(model):
        module._merge()
        del module._parameters[ROWS], module._buffers["row_ids"]
        module._non_persistent_buffers_set.discard("row_ids")
        module.__class__ = plain[type(module)]


@torch.no_grad()
def put_rows(module: nn.Module, ids: Tensor, values: Tensor) -> None:
    """Writes (R, D) values into rows `ids` of an embedding or a head, split or not."""
    matrix = cast(nn.Parameter, module.weight)
    ids = ids.to(matrix.device)
    if isinstance(module, _SplitRows):
        place = torch.searchsorted(module.row_ids, ids).clamp(max=len(module.row_ids) - 1)
        apart = module.row_ids[place] == ids
        module.rows[place[apart]] = values.to(module.rows)[apart]
    matrix.index_copy_(0, ids, values.to(matrix))


def split_modules(model: nn.Module) -> Iterator[_SplitRows]:
    """The split modules anywhere in a model."""
    return (module for module in list(model.modules()) if isinstance(module, _SplitRows))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor's rows lie on several processes (FSDP2 outside of its forward)."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def vocabulary(model: Any) -> list[nn.Module]:
    """The modules of a causal language model whose matrices have a row per id: embedding, head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in modules if module is not None]


def _check(module: nn.Module, ids: Tensor) -> None:
    if isinstance(module, _SplitRows):
        raise UsageError("this model's rows are split already; merge them first")
    if type(module) not in _PLAIN or getattr(module, "max_norm", None) is not None:
        raise CompositionError(
            f"rows of {type(module).__name__} cannot be trained apart: it computes more than a"
            " plain nn.Embedding or nn.Linear does; train the whole matrix"
        )
    rows = cast(Tensor, module.weight).shape[0]
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= rows:
        got = f"{int(ids.min())} .. {int(ids.max())}" if len(ids) else "none"
        raise UsageError(f"rows to train: got {got}, expected ids of 0 .. {rows - 1}")


def _write_rows(matrix: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Copies (R, D) into (V, D) at `ids`, of sharded matrices each process its own part."""
    if is_sharded(matrix):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sharded, rows = cast(Any, matrix), cast(Any, rows).full_tensor()
        _, (start, *_) = compute_local_shape_and_global_offset(
            sharded.shape, sharded.device_mesh, sharded.placements
        )
        matrix = sharded.to_local()
        here = (ids >= start) & (ids < start + len(matrix))
        ids, rows = ids[here] - start, rows[here]
    matrix.index_copy_(0, ids, rows.to(matrix.dtype))
