"""Messages to a sequence plan: ids, placeholders for media, labels.

The chat template writes one placeholder per medium; here each becomes as many positions as its
component takes, known exactly from the processors before anything is encoded. Media in a user
message are input; in an assistant message they are the target, and input again for later turns.

A plan is built per conversation and collated to a batch for `XoronModel.forward`. Shapes: n
positions of one conversation, B conversations, N positions of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xoron_core import advice
from xoron_core.composer.composition import Composition
from xoron_core.descriptors import Modality
from xoron_core.errors import PluginError, SequenceError
from xoron_core.losses import IGNORE
from xoron_core.tokens.space import TokenSpace

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Placed:
    """One medium of a conversation.

    Attributes:
        modality: its modality's name.
        target: whether an assistant says it.
        again: whether it is input again for later turns.
        route: `encoder`, `codec` or `generator` if its message chose one.
        media: what the modality's `load` gave.
        labels: a word for each of its positions, to learn from; None for nothing.
    """

    modality: str
    target: bool
    again: bool
    route: str | None
    media: Any
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Span:
    """Positions `start .. start + length - 1` that the component in `slot` fills with `item`."""

    slot: str
    start: int
    length: int
    item: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """One conversation, laid out.

    Attributes:
        input_ids: (n,) int64.
        learned: (n,) bool, positions an assistant says (and that are ids).
        spans: what media fill.
        labels: position to the id of the word that the medium's row there is to resemble.
    """

    input_ids: Tensor
    learned: Tensor
    spans: tuple[Span, ...] = field(default=())
    labels: Mapping[int, int] = field(default_factory=dict)


def route_slot(composition: Composition, modality: str, direction: str, chosen: str | None) -> str:
    """The slot that reads (`in`) or makes (`out`) media of a modality.

    Raises:
        PluginError: if the composition has none.
    """
    declared = composition.routes.get(modality)
    wanted = chosen or (declared and (declared.in_ if direction == "in" else declared.out))
    kinds = (
        [wanted]
        if wanted
        else ["encoder", "codec"]
        if direction == "in"
        else ["generator", "codec"]
    )
    for kind in kinds:
        if f"{modality}.{kind}" in composition.slots:
            return f"{modality}.{kind}"
    verb = "reads" if direction == "in" else "makes"
    filled = ", ".join(composition.slots)
    raise PluginError(
        f"nothing in this composition {verb} {modality} (looked for {' or '.join(kinds)}; it has:"
        f" {filled}); compose it with {modality}.{kinds[0]}{_install(modality, kinds[0])}"
    )


def _install(modality: str, kind: str) -> str:
    package = advice.install_slot(f"{modality}.{kind}")
    return f" (pip install {package})" if package else ""


def _foreign(index: int, kind: Any, known: Sequence[str]) -> str:
    """What to say of content that no part of the composition takes."""
    install = _install(str(kind), "encoder")
    fix = f"; compose it with {kind}.encoder{install}" if install else ""
    return f"message {index}: content of type {kind!r}; this model takes: {', '.join(known)}{fix}"


def media_parts(messages: Sequence[Message], modalities: Mapping[str, Modality]) -> list[Placed]:
    """The media of a conversation, in order, not yet loaded.

    Raises:
        SequenceError: for a content part of an unknown type, or without its data.
    """
    types = {t: m.name for m in modalities.values() for t in m.content_types}
    found = []
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = "text" if isinstance(part, str) else part.get("type")
            if kind == "text":
                continue
            if kind not in types:
                raise SequenceError(_foreign(index, kind, ["text", *types]))
            keys = (kind, "path", "url", "data")
            data = next((part[key] for key in keys if part.get(key) is not None), None)
            if data is None:
                raise SequenceError(
                    f"message {index}: {kind} content without {kind!r}, 'path', 'url' or 'data'"
                )
            target = message.get("role") == "assistant"
            again = target and index + 1 < len(messages)
            labels = part.get("labels")
            if labels is not None and target:
                raise SequenceError(
                    f"message {index}: {kind} of an assistant has labels, which are for what goes"
                    " in; give them to media of a user"
                )
            labels = None if labels is None else tuple(labels)
            found.append(Placed(types[kind], target, again, part.get("route"), data, labels))
    return found


def expand(
    ids: Tensor,
    learned: Tensor,
    placed: Sequence[Placed],
    *,
    composition: Composition,
    modalities: Mapping[str, Modality],
    space: TokenSpace,
    measure: Callable[[str, Any], tuple[Mapping[str, Any], int, int]],
    label_id: Callable[[str], int] | None = None,
) -> Plan:
    """Replaces each single placeholder by the positions that its medium takes.

    Args:
        ids: (n,) with one placeholder per medium.
        learned: (n,) bool.
        placed: the media in order.
        composition, modalities, space: of the model.
        measure: (slot, medium) to its item, its number of positions, and the id that stands there
            until it is filled.
        label_id: a label to its id; None leaves labels out.

    Raises:
        SequenceError: if placeholders and media differ in number, or a medium's positions and
            labels.
    """
    marks = {space.id_of(m.placeholder): m.name for m in modalities.values()}
    where = (
        torch.isin(ids, torch.tensor(sorted(marks), dtype=ids.dtype)).nonzero().flatten().tolist()
    )
    names = [marks[int(ids[i])] for i in where]
    if names != [medium.modality for medium in placed]:
        raise SequenceError(
            f"the conversation renders placeholders for {names or 'no media'} but holds"
            f" {[m.modality for m in placed] or 'none'}; the chat template must render every medium"
        )
    pieces: list[Tensor] = []
    flags: list[Tensor] = []
    spans: list[Span] = []
    labels: dict[int, int] = {}
    length = last = 0

    def push(values: Tensor, flag: Tensor) -> None:
        nonlocal length
        pieces.append(values)
        flags.append(flag)
        length += len(values)

    def push_span(slot: str, media: Any, learn: bool) -> None:
        item, count, stand_in = measure(slot, media)
        spans.append(Span(slot, length, count, item))
        push(ids.new_full((count,), stand_in), learned.new_full((count,), learn))

    for position, medium in zip(where, placed, strict=True):
        modality = modalities[medium.modality]
        push(ids[last:position], learned[last:position])
        direction = "out" if medium.target else "in"
        slot = route_slot(composition, medium.modality, direction, medium.route)
        push_span(slot, medium.media, medium.target and slot.endswith(".codec"))
        if label_id is not None and medium.labels is not None:
            labels |= _labels(medium, spans[-1], label_id)
        last = position + 1
        if medium.again and not slot.endswith(".codec"):
            # Its queries carry no media: later turns read it through the input route.
            after = last + 1  # behind the end marker of the output span
            push(ids[last:after], learned[last:after])
            last = after
            no = learned.new_zeros(1)
            push(ids.new_tensor([space.id_of(modality.begin)]), no)
            push_span(route_slot(composition, medium.modality, "in", None), medium.media, False)
            push(ids.new_tensor([space.id_of(modality.end)]), no)
    push(ids[last:], learned[last:])
    return Plan(torch.cat(pieces), torch.cat(flags), tuple(spans), labels)


def _labels(medium: Placed, span: Span, label_id: Callable[[str], int]) -> dict[int, int]:
    assert medium.labels is not None
    if len(medium.labels) != span.length:
        raise SequenceError(
            f"{medium.modality} in slot {span.slot!r} takes {span.length} positions but has"
            f" {len(medium.labels)} labels; give one for each position"
        )
    return {span.start + index: label_id(label) for index, label in enumerate(medium.labels)}


def collate(
    plans: Sequence[Plan],
    *,
    pad_id: int,
    padding_side: str = "right",
    train: bool = False,
    gather_items: Callable[[str, list[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Pads plans to one batch for `XoronModel.forward`.

    Args:
        plans: B conversations.
        pad_id: the id of padding positions.
        padding_side: `left` to generate, `right` to train.
        train: whether to add labels, of text and of media, and document ids.
        gather_items: (slot, items) to that component's tensors; needed where there are media.
    """
    B, N = len(plans), max(len(plan.input_ids) for plan in plans)
    input_ids = torch.full((B, N), pad_id, dtype=torch.int64)
    valid = torch.zeros(B, N, dtype=torch.int64)
    learned = torch.zeros(B, N, dtype=torch.bool)
    labels = torch.full((B, N), IGNORE, dtype=torch.int64)
    rows: dict[str, list[tuple[int, int, int]]] = {}
    items: dict[str, list[Mapping[str, Any]]] = {}
    for b, plan in enumerate(plans):
        n = len(plan.input_ids)
        start = N - n if padding_side == "left" else 0
        input_ids[b, start : start + n] = plan.input_ids
        valid[b, start : start + n] = 1
        learned[b, start : start + n] = plan.learned
        for position, token in plan.labels.items():
            labels[b, start + position] = token
        for span in plan.spans:
            rows.setdefault(span.slot, []).append((b, start + span.start, span.length))
            items.setdefault(span.slot, []).append(span.item)
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": valid}
    if train:
        batch["labels"] = torch.where(learned, input_ids, IGNORE)
        if any(plan.labels for plan in plans):
            batch["media_labels"] = labels
        batch["document_ids"] = valid.clone()
    if items:
        assert gather_items is not None
        batch["media"] = {
            slot: {**gather_items(slot, entries), "spans": torch.tensor(rows[slot])}
            for slot, entries in items.items()
        }
    return batch
