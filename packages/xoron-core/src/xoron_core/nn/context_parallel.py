"""Context parallelism: one sequence shared by the processes of a group, exactly.

    group = torch.distributed.group.WORLD                # or a mesh dimension's group
    parallelize(model, group)                            # its layers attend by `nn.ring`
    out = model(**shard(batch, group=group))             # batch: the whole one, on every process
    out.loss.backward()                                  # each process's share of the loss
    sum_gradients(model, group=group)                    # and of the gradients
    logits = unshard(out.logits, length, group=group)    # (B, N, V), where they are needed

After a prefill `gather_cache` gives every process the whole cache; without the ring
(`deparallelize`) each then decodes on its own.

Footguns:
- Collective: every process of the group runs the same forward and backward passes in the same
  order. Checks that could let one process stop and hang the others are made in `shard`, where all
  of them see the whole batch; use it.
- What the ring cannot keep apart is refused: packed documents, padding that is not at the end, a
  cache that already holds positions.
- Losses, gradients and router statistics are shares and add up over the group. FSDP2 and DDP
  average gradients over their processes: where those are the same, multiply the loss by W.
- A router's sequence-wise balance loss is computed per shard: a row counts once on each process.
- A parallelized model holds a process group, so that it cannot be copied or pickled; its weights
  can.

Shapes: B rows, N positions, n = (N + padding) / W of a shard, W processes, D width, V rows of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from xoron_core.components import LossTerm
from xoron_core.errors import CompositionError, SequenceError
from xoron_core.losses import IGNORE, Ranges, token_loss
from xoron_core.nn import ring, zigzag
from xoron_core.nn.kernel_choice import Choice

Model = TypeVar("Model", bound=nn.Module)

# What `shard` takes: the dimension of positions, and what padding at the end is filled with.
_FIELDS: dict[str, tuple[int, int]] = {
    "input_ids": (1, 0),
    "inputs_embeds": (1, 0),
    "attention_mask": (1, 0),
    "document_ids": (1, 0),
    "position_ids": (-1, 0),
    "labels": (1, IGNORE),
    "loss_weights": (1, 0),
    "position_groups": (1, 0),
}


def parallelize(model: Model, group: ring.Group = None) -> Model:
    """Lets a model's layers attend over a sequence that the processes of a group share.

    Every module inside that declares a `context_group` gets it. Parameters are not touched.

    Args:
        model: such as `XoronMoeForCausalLM`, or anything that holds one.
        group: the processes; None is all of them.

    Raises:
        CompositionError: if nothing inside can be parallelized.
    """
    if not _set_group(model, group if group is not None else dist.group.WORLD):
        raise CompositionError(
            f"{type(model).__name__} has no part that can share a sequence between processes;"
            " expected one with a xoron-moe backbone"
        )
    return model


def deparallelize(model: Model) -> Model:
    """Undoes `parallelize`."""
    _set_group(model, None)
    return model


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that share a model's sequences, or None if it is not parallelized."""
    groups = (getattr(module, "context_group", None) for module in model.modules())
    return next((group for group in groups if group is not None), None)


def shard(batch: Mapping[str, Any], *, group: ring.Group = None) -> dict[str, Any]:
    """This process's part of a batch, in zig-zag order, as keywords of a model's forward.

    Args:
        batch: whole tensors, equal on every process: `input_ids` (B, N) or `inputs_embeds` (B, N,
            D), and any of `attention_mask`, `document_ids`, `labels`, `loss_weights` (B, N) and
            `position_ids` (B or 1, N) or (3, B, N), `position_groups` (B, N).
        group: the processes; None is all of them.

    Returns:
        The same names, N padded at its end to a multiple of 2 W and shared; with these changes:
        `position_ids` are there and global; `attention_mask` is there if there is padding,
        `document_ids` never is; `labels` and `loss_weights` become `shift_labels` and
        `shift_weights`, each beside the position that predicts it, with `num_items_in_batch`, the
        number of predicted labels in the whole batch, by which a share of the loss is divided.

    Raises:
        SequenceError: for names that cannot be shared, documents, or padding that is not at the
            end; on every process alike.
    """
    whole, length = _checked(batch)
    device = next(iter(whole.values())).device
    mask = _end_padding(whole.pop("attention_mask", None), whole.pop("document_ids", None))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    missing = zigzag.padding(length, world)
    if missing and mask is None:
        rows = whole["input_ids" if "input_ids" in whole else "inputs_embeds"].shape[0]
        mask = torch.ones(rows, length, dtype=torch.long, device=device)
    if mask is not None:
        whole["attention_mask"] = mask
    whole.setdefault("position_ids", torch.arange(length, device=device).unsqueeze(0))
    labels, weights = whole.pop("labels", None), whole.pop("loss_weights", None)
    result: dict[str, Any] = {}
    if labels is not None:
        following = zigzag.next_labels(labels)
        result["num_items_in_batch"] = (following != IGNORE).sum()
        whole["shift_labels"] = following
    if weights is not None:
        whole["shift_weights"] = F.pad(weights[:, 1:], (0, 1))
    for name, tensor in whole.items():
        dim, filling = _FIELDS.get(name, (1, IGNORE if name == "shift_labels" else 0))
        padded = _pad(tensor, missing, dim=dim, value=filling)
        result[name] = zigzag.shard(padded, rank=rank, world_size=world, dim=dim)
    return result


def text_loss(
    hidden: Tensor,
    part: Mapping[str, Tensor],
    logits: Callable[[Tensor], Tensor],
    *,
    head: nn.Module | None = None,
    legal: Ranges = (),
) -> LossTerm:
    """This process's share of `losses.text_loss`, sum and count; they add up to the whole.

    Args:
        hidden: (B, n, D) of this shard.
        part: what `shard` returned, with `shift_labels` and maybe `shift_weights`.
        logits, head, legal: as for `losses.text_loss`.
    """
    labels, weights = part["shift_labels"], part.get("shift_weights")
    predicts = labels != IGNORE
    own = None if weights is None else weights[predicts].float()
    return token_loss(
        hidden[predicts], labels[predicts], logits, head=head, weights=own, legal=legal
    )


def text_count(part: Mapping[str, Tensor]) -> Tensor:
    """The count that `text_loss` will return: a share too."""
    predicts = part["shift_labels"] != IGNORE
    weights = part.get("shift_weights")
    return predicts.sum().float() if weights is None else weights[predicts].float().sum()


def unshard(
    tensor: Tensor, length: int | None = None, *, group: ring.Group = None, dim: int = 1
) -> Tensor:
    """What a forward pass returned, whole on every process, without gradient.

    Args:
        tensor: logits or hidden states (B, n, ...).
        length: N, to drop what was padded; None keeps it.
        group: the processes; None is all of them.
        dim: of the positions.

    Returns:
        (B, N, ...).
    """
    whole = ring.gather(tensor.detach(), dim=dim, group=group)
    return whole if length is None else whole.narrow(dim, 0, length)


@torch.no_grad()
def sum_gradients(model: nn.Module, *, group: ring.Group = None) -> None:
    """Adds up the processes' shares of every gradient, in place.

    For gradients that are whole on every process: not under FSDP2 or DDP, which reduce them.
    A parameter that has a gradient on any process gets one on all.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    seen = torch.tensor([p.grad is not None for p in trained], device=trained[0].device)
    present = seen.int()
    dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    works = []
    for parameter, found in zip(trained, present.tolist(), strict=True):
        if found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, group=group, async_op=True))
    for work in works:
        work.wait()


def gather_cache(
    cache: DynamicCache, length: int | None = None, *, group: ring.Group = None
) -> DynamicCache:
    """The cache of the whole sequence on every process, from the shards of a prefill.

    What travels is what is cached: for latent attention r + d_rope numbers per position and layer.

    Args:
        cache: as the parallelized model returned it; it stays as it is.
        length: N, to drop what was padded at the end; None keeps it.
        group: the processes; None is all of them.

    Returns:
        An ordinary cache with N positions, to go on with without the ring.
    """
    whole = DynamicCache()
    whole.layer_class_to_replicate = type(cache.layers[0])
    for index, layer in enumerate(cache.layers):
        if layer.keys is None:  # it holds no positions but media, equal on every process
            whole.layers.append(layer.behind(whole.layers[0]))
            continue
        keys = unshard(layer.keys, length, group=group, dim=2)
        if layer.values.shape[-1]:
            values = unshard(layer.values, length, group=group, dim=2)
        else:  # latent attention keeps everything in its keys
            values = keys[..., :0]
        whole.update(keys, values, index)
    return whole


def choose(
    group: dist.ProcessGroup,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Choice:
    """The ring as the kernel of a forward pass, beside `kernel_choice.choose`.

    Args:
        group: the processes that share the sequence.
        past: cached positions; there must be none.
        attention_mask: (B, n) of this shard, 0 where it was padded at the end, or None.
        document_ids: must be None.

    Raises:
        SequenceError: for what the ring cannot do, as far as this process sees it.
    """
    if past:
        raise SequenceError(
            f"the cache already holds {past} positions, but a sequence that processes share is"
            " prefilled at once; for decoding, take context_parallel.gather_cache(cache) and"
            " deparallelize the model"
        )
    if document_ids is not None:
        raise SequenceError(_NO_DOCUMENTS)
    if attention_mask is not None and (attention_mask.ndim != 2 or not _at_end(attention_mask)):
        raise SequenceError(_END_ONLY)
    return Choice(_Ring(group), None)


def positions(length: int, *, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Global positions (1, n) of this process's shard of n positions."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    places = zigzag.positions(length * world, rank=rank, world_size=world, device=device)
    return places.unsqueeze(0)


class _Ring:
    """`ring_attention` as a kernel; padding stands at the end, where nobody looks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        return ring.ring_attention(q, k, v, group=self.group, causal=causal, scale=scale)


_NO_DOCUMENTS = (
    "ring attention keeps no documents apart: give every row one document (no packing), or run"
    " without context parallelism"
)
_END_ONLY = (
    "ring attention takes padding at the end of rows only, got some before valid positions; pad on"
    " the right"
)


def _set_group(model: nn.Module, group: dist.ProcessGroup | None) -> int:
    """How many modules took it."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "context_group")]
    for module in found:
        module.context_group = group
    return len(found)


def _checked(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors that are given, and N."""
    if unknown := [name for name in batch if name not in _FIELDS]:
        raise SequenceError(
            f"cannot share {', '.join(unknown)} between processes; expected some of"
            f" {', '.join(_FIELDS)}. Pass other keywords to the model beside the shard"
        )
    whole = {name: tensor for name, tensor in batch.items() if tensor is not None}
    lengths = {name: int(tensor.shape[_FIELDS[name][0]]) for name, tensor in whole.items()}
    inputs = [name for name in ("input_ids", "inputs_embeds") if name in whole]
    if len(inputs) != 1 or len(set(lengths.values())) != 1:
        got = ", ".join(f"{name}: {length} positions" for name, length in lengths.items())
        raise SequenceError(
            "expected input_ids or inputs_embeds, one of them, and equally many positions"
            f" everywhere; got {got or 'nothing'}"
        )
    return whole, lengths[inputs[0]]


def _end_padding(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Both as one (B, N) mask that is 0 at the end of rows only, or None without padding."""
    given = [t != 0 for t in (attention_mask, document_ids) if t is not None]
    if document_ids is not None:
        others = (document_ids != 0) & (document_ids != document_ids[:, :1])
        if bool(others.any()):
            raise SequenceError(_NO_DOCUMENTS)
    if not given:
        return None
    valid = given[0] if len(given) == 1 else given[0] & given[1]
    if bool(valid.all()):
        return None
    if not _at_end(valid):
        raise SequenceError(_END_ONLY)
    return valid.long()


def _at_end(attention_mask: Tensor) -> bool:
    valid = attention_mask != 0
    return bool((valid[:, 1:] <= valid[:, :-1]).all())


def _pad(tensor: Tensor, missing: int, *, dim: int, value: int) -> Tensor:
    after = tensor.ndim - 1 - dim % tensor.ndim
    return F.pad(tensor, (0, 0) * after + (0, missing), value=value)
