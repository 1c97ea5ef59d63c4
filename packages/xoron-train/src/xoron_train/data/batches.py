"""From global rows to the micro-batches of one process.

The rows of an optimizer step are sorted by length before they are cut into micro-batches, so that
little of a batch is padding. That changes no gradient: a step's loss is one sum over all its rows.
Micro-batches are dealt to the processes in turn, so that none gets all the long ones.

Shapes: B rows of a batch, N positions of the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xoron_core import sequence
from xoron_core.sequence import Plan
from xoron_train.data import packing
from xoron_train.data.budgets import Budgets, cut_down
from xoron_train.data.packing import Row
from xoron_train.data.stream import row_length
from xoron_train.data.talks import Talk

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor


class Window:
    """One optimizer step's rows, over all processes, as micro-batches.

    Args:
        rows: of the step.
        size: rows of a micro-batch.
        budgets: for media; None leaves them as they were laid out.
        step: number of the step, for the draws.
    """

    def __init__(
        self, rows: Sequence[Row | Talk], *, size: int, budgets: Budgets | None, step: int
    ) -> None:
        ordered = sorted(rows, key=row_length)
        self.groups = [ordered[start : start + size] for start in range(0, len(rows), size)]
        if budgets is not None and budgets.choices:
            self.groups = [
                [with_budget(row, budgets.draw(step, number)) for row in group]
                for number, group in enumerate(self.groups)
            ]

    def of_process(self, process: int, processes: int) -> list[list[Row | Talk]]:
        """The micro-batches of one process; every process has the same number."""
        return self.groups[process::processes]

    @property
    def positions(self) -> int:
        """Positions of all rows, without padding to the longest."""
        return sum(row_length(row) for group in self.groups for row in group)

    def media(self, modality_of: Mapping[str, str]) -> Counter[str]:
        """How many media of each modality all rows hold.

        Args:
            modality_of: modality by slot.
        """
        found: Counter[str] = Counter()
        for row in (row for group in self.groups for row in group if isinstance(row, Talk)):
            spans = () if row.plan is None else row.plan.spans
            found.update(modality_of[span.slot] for span in spans)
            found.update({modality_of[slot]: len(items) for slot, items in row.media.items()})
        return found


def with_budget(row: Row | Talk, budgets: Mapping[str, int]) -> Row | Talk:
    """A row whose media take the given numbers of positions; text as it is."""
    if isinstance(row, Row) or row.plan is None or not row.plan.spans:
        return row
    return replace(row, plan=cut_down(row.plan, budgets))


def collate(
    rows: Sequence[Row | Talk], processor: XoronProcessor, *, pad_token_id: int
) -> dict[str, Any]:
    """Rows to the batch that a model takes, padded on the right to the longest.

    Text keeps the document ids and positions that it was packed with. A conversation is one
    document that counts from 0.

    Args:
        rows: B of them.
        processor: collates media.
        pad_token_id: id at padding positions.
    """
    texts = [row for row in rows if isinstance(row, Row)]
    if len(texts) == len(rows):
        return packing.collate(texts, pad_token_id=pad_token_id)
    batch = sequence.collate(
        [_plan(row) for row in rows],
        pad_id=pad_token_id,
        train=True,
        gather_items=processor.collate_media,
    )
    if texts:
        _keep_packing(batch, rows, pad_token_id)
    return batch


def _plan(row: Row | Talk) -> Plan:
    if isinstance(row, Row):
        return Plan(torch.from_numpy(row.tokens), torch.from_numpy(row.documents > 0))
    assert row.plan is not None
    return row.plan


def _keep_packing(batch: dict[str, Tensor], rows: Sequence[Row | Talk], pad_token_id: int) -> None:
    """Writes the documents and positions of packed rows, which `sequence.collate` knows not of."""
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).clone()
    for index, row in enumerate(rows):
        if isinstance(row, Row):
            size = len(row.tokens)
            documents = torch.from_numpy(row.documents)
            batch["document_ids"][index, :size] = documents
            batch["attention_mask"][index, :size] = (documents > 0).to(torch.int64)
            batch["input_ids"][index, :size].masked_fill_(documents == 0, pad_token_id)
            positions[index, :size] = torch.from_numpy(row.positions)
    batch["position_ids"] = positions.where(batch["document_ids"] > 0, 0)


def to_device(value: Any, device: torch.device) -> Any:
    """Nested tensors of a batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: to_device(entry, device) for key, entry in value.items()}
