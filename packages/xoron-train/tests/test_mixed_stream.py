"""Proves that text and conversations share one stream: by shares of positions, exactly restored, in
batches that change no loss, with budgets that are what the processor itself would lay out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xoron_core.api import load
from xoron_core.errors import ConfigError
from xoron_core.model import XoronModel
from xoron_core.processor import XoronProcessor
from xoron_train.data.batches import Window, collate
from xoron_train.data.budgets import Budgets, cut_down
from xoron_train.data.length_groups import LengthGroups
from xoron_train.data.packing import Row, empty_row
from xoron_train.data.stream import DocumentTokens, TrainStream, row_length
from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.data.talks import Talk
from xoron_train.recipe import Recipe

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}


@pytest.fixture(scope="module")
def loaded(new_model: Callable[..., Path]) -> tuple[XoronModel, XoronProcessor]:
    return load(new_model(grid=GRID))


@pytest.fixture
def mixed(new_recipe: Callable[..., Recipe], corpus: Path) -> Callable[..., Recipe]:
    """A recipe of text and conversations."""

    def make(**changes: Any) -> Recipe:
        words = {"kind": "files", "path": str(corpus), "pattern": "*.txt"}
        grids = {"kind": "dataset", "path": "standin-grids", "options": {"size": 30}}
        keys = {"sequence_length": 128, "shuffle_rows": 5}
        return new_recipe(mixture={"words": words, "grids": grids}, **{**keys, **changes})

    return make


def stream(recipe: Recipe, processor: XoronProcessor) -> TrainStream:
    assert processor.tokenizer is not None
    talks = TalkMixture(recipe, processor).training
    return TrainStream(recipe, DocumentTokens(processor.tokenizer), talks=talks)


def ids(row: Row | Talk) -> list[int]:
    if isinstance(row, Row):
        return row.tokens.tolist()
    assert row.plan is not None
    return row.plan.input_ids.tolist()


@pytest.mark.parametrize("cut", [0, 1, 3, 11, 50])
def test_a_mixed_stream_restored_anywhere_goes_on_exactly(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe], cut: int
) -> None:
    one, other = (stream(mixed(), loaded[1]) for _ in range(2))
    one.rows(cut)
    state = one.state_dict()
    assert sum(t.numel() for t in state.tensors.values()) < 5000  # ids of text, no media
    other.load_state_dict(state._replace(data=json.loads(json.dumps(state.data))))
    assert [ids(row) for row in one.rows(90)] == [ids(row) for row in other.rows(90)]
    assert one.cursors["grids"].epoch > 0


def test_text_beside_conversations_is_the_text_that_it_is_alone(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    recipe = mixed()
    alone = stream(
        recipe.model_copy(update={"mixture": {"words": recipe.mixture["words"]}}), loaded[1]
    )
    beside = [row for row in stream(recipe, loaded[1]).rows(60) if isinstance(row, Row)]
    assert 5 < len(beside) < 55
    for row, expected in zip(beside, alone.rows(len(beside)), strict=True):
        assert isinstance(expected, Row)
        assert all(np.array_equal(a, b) for a, b in zip(row, expected, strict=True))


def test_the_mixture_holds_shares_of_positions(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    recipe = mixed()
    grids = recipe.mixture["grids"].model_copy(update={"weight": 3.0})
    recipe = recipe.model_copy(update={"mixture": {**recipe.mixture, "grids": grids}})
    rows = stream(recipe, loaded[1]).rows(1000)
    talks = sum(row_length(row) for row in rows if isinstance(row, Talk))
    assert talks / sum(map(row_length, rows)) == pytest.approx(0.75, abs=0.01)


def grouped(recipe: Recipe, processor: XoronProcessor) -> LengthGroups:
    return LengthGroups(stream(recipe, processor), steps=4, seed=1)


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 6])
def test_grouped_steps_restored_anywhere_go_on_exactly(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe], cut: int
) -> None:
    one, other = (grouped(mixed(), loaded[1]) for _ in range(2))
    for _ in range(cut):
        one.rows(5)
    state = one.state_dict(5)
    other.load_state_dict(state._replace(data=json.loads(json.dumps(state.data))))
    for _ in range(9):
        assert [ids(row) for row in one.rows(5)] == [ids(row) for row in other.rows(5)]
        again, expected = (stream_.state_dict(5).data for stream_ in (other, one))
        assert again == expected


def test_grouped_steps_hold_the_same_rows_by_length(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    groups = grouped(mixed(), loaded[1])
    steps = [groups.rows(5) for _ in range(8)]
    plain = stream(mixed(), loaded[1]).rows(40)
    for start in (0, 4):
        taken = steps[start : start + 4]
        rows = [ids(row) for step in taken for row in step]
        assert sorted(rows) == sorted(map(ids, plain[start * 5 : start * 5 + 20]))
        spans = sorted((min(lengths), max(lengths)) for lengths in map(lengths_of, taken))
        assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))
    assert [min(lengths_of(step)) for step in steps] != sorted(map(min, map(lengths_of, steps)))


def lengths_of(rows: list[Row | Talk]) -> list[int]:
    return [row_length(row) for row in rows]


def losses(model: XoronModel, batch: dict[str, Any]) -> tuple[float, float]:
    with torch.no_grad():
        term = model.eval()(**batch, use_cache=False).losses["text"]
    return float(term.sum), float(term.count)


def test_a_mixed_batch_has_the_losses_of_its_rows_apart(
    loaded: tuple[XoronModel, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    model, processor = loaded
    rows = stream(mixed(sequence_length=96), processor).rows(9)
    rows.insert(4, Row(*(np.pad(part[:50], (0, 46)) for part in next(filter(is_text, rows)))))
    assert len({row_length(row) for row in rows}) > 2
    together = losses(model, collate(rows, processor, pad_token_id=7))
    # Apart, a conversation goes the processor's own way and text the way of text alone.
    apart = []
    for row in rows:
        if isinstance(row, Row):
            batch = collate([row], processor, pad_token_id=7)
        else:
            assert row.conversation is not None
            batch = dict(processor(row.conversation.messages, train=True))
        apart.append(losses(model, batch))
    sums, counts = map(sum, zip(*apart, strict=True))
    assert together[1] == counts > 0
    assert together[0] == pytest.approx(sums, rel=1e-5)
    nothing = collate([*rows, empty_row(3)], processor, pad_token_id=7)
    assert losses(model, nothing) == pytest.approx(together, rel=1e-6)


def is_text(row: Row | Talk) -> bool:
    return isinstance(row, Row)


def test_windows_hold_all_rows_with_little_padding_and_deal_them_evenly(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    rows = stream(mixed(), loaded[1]).rows(24)
    window = Window(rows, size=3, budgets=None, step=0)
    dealt = [window.of_process(process, 2) for process in range(2)]
    assert [len(groups) for groups in dealt] == [4, 4]
    flat = [row for groups in dealt for group in groups for row in group]
    assert sorted(map(ids, flat)) == sorted(map(ids, rows))
    assert window.positions == sum(map(row_length, rows))

    def padded(groups: list[list[Row | Talk]]) -> int:
        return sum(max(map(row_length, group)) * len(group) for group in groups)

    plain = [rows[start : start + 3] for start in range(0, 24, 3)]
    assert window.positions <= padded(window.groups) < 0.9 * padded(plain)
    assert window.media({"grid.encoder": "grid"}) == {
        "grid": sum(isinstance(row, Talk) for row in rows)
    }


def test_rows_of_one_length_keep_their_order(
    loaded: tuple[Any, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    rows = [row for row in stream(mixed(), loaded[1]).rows(40) if is_text(row)]
    window = Window(rows, size=4, budgets=None, step=0)
    assert [ids(row) for group in window.groups for row in group] == [ids(row) for row in rows]


def test_cut_down_is_what_the_processor_lays_out(
    loaded: tuple[XoronModel, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    processor = loaded[1]
    dataset = TalkMixture(mixed(), processor).samples("grids", "unseen", 3)
    messages = [
        message
        for conversation in dataset
        for message in [*conversation.messages, {"role": "user", "content": "and?"}]
    ]
    full = processor.plan(messages, train=True)
    assert [span.length for span in full.spans] == [4, 4, 4]
    for count in (1, 2, 4, 9):
        processor.budgets = {"grid.projector": min(count, 4)}
        expected = processor.plan(messages, train=True)
        processor.budgets = {}
        found = cut_down(full, {"grid.projector": count})
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.learned, expected.learned)
        places = [(s.slot, s.start, s.length, s.item["counts"]) for s in found.spans]
        assert places == [(s.slot, s.start, s.length, s.item["counts"]) for s in expected.spans]
    assert cut_down(full, {}).input_ids.tolist() == full.input_ids.tolist()


def test_budgets_are_drawn_by_step_and_micro_batch_alone(
    loaded: tuple[XoronModel, XoronProcessor], mixed: Callable[..., Recipe]
) -> None:
    model, processor = loaded
    budgets = Budgets(model, {"grid.projector": "random"}, seed=3)
    assert budgets.largest == {"grid.projector": 4}
    drawn = [budgets.draw(step, n)["grid.projector"] for step in range(150) for n in range(4)]
    shares = {count: drawn.count(count) / len(drawn) for count in (1, 2, 4)}
    assert all(0.28 < share < 0.39 for share in shares.values()), shares
    other = Budgets(model, {"grid.projector": "random"}, seed=4)
    assert drawn != [other.draw(step, n)["grid.projector"] for step in range(150) for n in range(4)]
    rows = [row for row in stream(mixed(), processor).rows(60) if isinstance(row, Talk)][:16]
    window = Window(rows, size=2, budgets=budgets, step=5)
    for number, group in enumerate(window.groups):
        expected = budgets.draw(5, number)["grid.projector"]
        for row in group:
            assert isinstance(row, Talk)
            assert row.plan is not None
            assert [span.length for span in row.plan.spans] == [expected]
    assert len({row.plan.spans[0].length for group in window.groups for row in group}) > 1


def test_budgets_that_a_model_cannot_keep_are_refused(
    loaded: tuple[XoronModel, XoronProcessor], new_model: Callable[..., Path]
) -> None:
    model = loaded[0]
    assert Budgets(model, {"grid.projector": 3}).largest == {"grid.projector": 3}
    with pytest.raises(ConfigError, match=r"budgets\.grid\.projector: 5 is more than .* 4"):
        Budgets(model, {"grid.projector": 5})
    with pytest.raises(ConfigError, match=r"makes a fixed number .* in this model: grid.projector"):
        Budgets(model, {"grid.encoder": 2})
    fixed = {**GRID, "projector": {"use": "standin-grid", "budgets": []}}
    with pytest.raises(ConfigError, match=r"has none; compose it with grid\.projector\.budgets"):
        Budgets(load(new_model(grid=fixed))[0], {"grid.projector": "random"})
