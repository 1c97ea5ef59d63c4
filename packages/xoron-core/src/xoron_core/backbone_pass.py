"""One pass through the backbone: the columns it is told of, and the media it may look at.

Under context parallelism every process puts media into the whole sequence, so that spans keep
their meaning; embeddings, labels and masks are shared behind that.

Shapes: B rows, N positions, n of them in this process's share, D backbone width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from xoron_core import media_memory
from xoron_core.components import BackboneOutput, Fusion, Generator
from xoron_core.errors import SequenceError
from xoron_core.media import Embedded, Media
from xoron_core.modality_groups import position_groups
from xoron_core.nn import context_parallel

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

Columns = Mapping[str, Tensor | None]

# What goes to the backbone beside embeddings and cache.
_NAMES = ("attention_mask", "position_ids", "document_ids", "position_groups")
_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "document_ids", "labels", "loss_weights")


def run(
    model: XoronModel,
    embedded: Embedded,
    columns: Columns,
    *,
    cache: Any,
    use_cache: bool,
    input_ids: Tensor | None,
    loss_weights: Tensor | None,
    media: Media,
) -> tuple[BackboneOutput, dict[str, Any] | None]:
    """Runs the backbone's layers; positions read media between them where there are media to read.

    Args:
        model: the composed model.
        embedded: embeddings, labels and spans of the whole sequence.
        columns: `attention_mask`, `position_ids` and `document_ids`, or None each.
        cache: of the positions before these, or None.
        use_cache: whether to return a cache.
        input_ids: (B, N), where there are ids.
        loss_weights: (B, N), or None.
        media: slot to its tensors and `spans`.

    Returns:
        What the backbone gave, and what `context_parallel.shard` did, None without a group.

    Raises:
        SequenceError: for what a shared sequence cannot hold.
    """
    backbone = model.need_backbone()
    columns = {**columns, **_groups(model, embedded, input_ids, media)}
    embeds, shared = embedded.embeds, None
    group = context_parallel.group_of(backbone)
    if group is not None:
        _refuse_generators(model, media)
        text = {"labels": embedded.labels, "loss_weights": loss_weights}
        shared = context_parallel.shard({"inputs_embeds": embeds, **columns, **text}, group=group)
        embeds, columns = shared["inputs_embeds"], shared
    options: dict[str, Any] = {name: columns[name] for name in _NAMES if name in columns}
    memory = media_memory.remember(model.fusion, embedded.embeds, embedded.spans, cache=cache)
    if memory is not None:
        options["after_layer"] = media_memory.after_layer(
            cast(Fusion, model.fusion),
            memory,
            _places(embeds, group),
            cache=cache,
            document_ids=columns.get("document_ids"),
        )
    output: BackboneOutput = backbone(embeds, cache=cache, use_cache=use_cache, **options)
    if memory is not None and embedded.spans is not None and output.cache is not None:
        media_memory.keep(output.cache, memory)
    return output, shared


def text_share(batch: Mapping[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """This process's share of a batch's ids, labels and masks, before any forward."""
    return context_parallel.shard({name: batch.get(name) for name in _TEXT}, group=group)


def _groups(
    model: XoronModel, embedded: Embedded, input_ids: Tensor | None, media: Media
) -> dict[str, Tensor]:
    """What a backbone that observes modalities apart is told of its positions in training."""
    if not model.training or len(model.need_backbone().group_names) < 2:
        return {}
    ids = position_groups(
        embedded.embeds, input_ids, media, composition=model.composition, space=model.space
    )
    return {"position_groups": ids}


def _places(embeds: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(N,) where the positions stand in the sequence."""
    length, device = embeds.shape[1], embeds.device
    if group is None:
        return torch.arange(length, device=device)
    return context_parallel.positions(length, group=group, device=device)[0]


def _refuse_generators(model: XoronModel, media: Media) -> None:
    if named := [slot for slot in model.parts(Generator) if slot in media]:
        raise SequenceError(
            f"{', '.join(named)}: a generator reads the hidden states of whole spans, which context"
            " parallelism divides; train it without"
        )
