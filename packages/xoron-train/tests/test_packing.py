"""Proves that packing keeps every token exactly once with right documents and positions, that its
state can be cut anywhere, and that a packed row's loss is the sum of its documents' losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xoron_core.api import load
from xoron_core.losses import target_mask
from xoron_train.data.packing import Packer, Row, collate

documents = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(
    # Token values count up over all documents, so that any loss or repetition shows.
    lambda sizes: np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
)


def pack(items: list[np.ndarray], length: int, *, bridge: bool = False) -> list[Row]:
    packer = Packer(length, bridge=bridge)
    rows = []
    for item in items:
        packer.add(item)
        while (row := packer.pop()) is not None:
            rows.append(row)
    return [*rows, *packer.drain()]


@given(documents, st.integers(2, 30))
def test_every_token_appears_exactly_once_in_order(items: list[np.ndarray], length: int) -> None:
    rows = pack(items, length)
    kept = np.concatenate([row.tokens[row.documents > 0] for row in rows])
    assert kept.tolist() == np.concatenate(items).tolist()
    assert all(len(row.tokens) == length for row in rows)
    # Only the last row may be padded.
    assert all((row.documents > 0).all() for row in rows[:-1])


@given(documents, st.integers(2, 30))
def test_documents_and_positions_follow_the_pieces(items: list[np.ndarray], length: int) -> None:
    owner = np.concatenate([np.full(len(item), number) for number, item in enumerate(items)])
    for row in pack(items, length):
        real = int((row.documents > 0).sum())
        document = position = 0
        for index in range(real):
            starts = index == 0 or owner[row.tokens[index]] != owner[row.tokens[index - 1]]
            document, position = (document + 1, 0) if starts else (document, position + 1)
            assert (row.documents[index], row.positions[index]) == (document, position)


@given(documents, st.integers(2, 30))
def test_with_a_bridge_each_token_but_the_first_is_predicted_once(
    items: list[np.ndarray], length: int
) -> None:
    batch = collate(pack(items, length, bridge=True), pad_token_id=0)
    predicted = batch["labels"][:, 1:][target_mask(batch["labels"], batch["document_ids"])]
    expected = [token for item in items for token in item[1:].tolist()]
    assert predicted.tolist() == expected


@given(documents, st.integers(2, 30), st.data())
def test_a_restored_packer_goes_on_exactly(
    items: list[np.ndarray], length: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(items)))
    one = Packer(length)
    for item in items[:cut]:
        one.add(item)
    for _ in range(data.draw(st.integers(0, 3))):
        one.pop()
    other = Packer(length)
    other.load_state_dict(one.state_dict())
    for packer in (one, other):
        for item in items[cut:]:
            packer.add(item)
    for row, copy in zip(one.drain(), other.drain(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(row, copy, strict=True))


def test_padding_is_no_label_and_is_masked() -> None:
    packer = Packer(4)
    packer.add([7, 8])
    batch = collate(list(packer.drain()), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 9]]
    assert batch["labels"].tolist() == [[7, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_a_packed_row_has_the_summed_loss_of_its_documents(new_model: Callable[..., Path]) -> None:
    model, _ = load(new_model(dropout=0.0))
    generator = torch.Generator().manual_seed(1)
    items = [torch.randint(0, 256, (n,), generator=generator).numpy() for n in (9, 3, 12, 8)]
    packed = pack(items, 32)
    assert len(packed) == 1
    with torch.no_grad():
        together = model(**collate(packed, pad_token_id=0)).losses["text"]
        apart = [
            model(**collate(pack([item], 32), pad_token_id=0)).losses["text"] for item in items
        ]
    assert together.count == sum(term.count for term in apart) == 32 - len(items)
    torch.testing.assert_close(together.sum, sum(term.sum for term in apart), rtol=1e-5, atol=1e-5)
