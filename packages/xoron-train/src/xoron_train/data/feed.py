"""Feeds a run: the rows of each optimizer step, and the batches that one process makes of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xoron_core.errors import ConfigError
from xoron_train.data.batches import Window, collate, with_budget
from xoron_train.data.budgets import Budgets
from xoron_train.data.length_groups import LengthGroups
from xoron_train.data.packing import Row
from xoron_train.data.stream import DocumentTokens, StreamState, TrainStream, token_bytes
from xoron_train.data.talk_mixture import TalkMixture
from xoron_train.data.talks import Talk
from xoron_train.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class BaseFeed(ABC):
    """The rows of each step, and one process's batches of them.

    Args:
        recipe: resolved.
        model: whose slots take the data.
        accelerator: its processes share the rows.

    Attributes:
        unit: what `positions` counts.
        positions: of rows handed out so far, on all processes.
        options: of the model's forward, beside a batch.
        processor: collates.
        talks: the mixture's conversations.
        budgets: of the model's projectors.
        tokenize: text to the ids of a document; None without text.
        bytes_of: (vocabulary,) UTF-8 bytes per token, or None if the tokenizer is not byte-level.
    """

    unit = "tokens"
    processor: XoronProcessor
    talks: TalkMixture
    tokenize: DocumentTokens | None = None
    bytes_of: Tensor | None = None

    def __init__(self, recipe: Recipe, model: XoronModel, *, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.budgets = Budgets(model, recipe.budgets, seed=recipe.seed)
        self.positions = 0
        self.options = {"use_cache": False, **({"legal": True} if recipe.legal else {})}

    def begin(self, stream: TrainStream) -> None:
        """Goes by this stream from now on.

        Raises:
            DataError: if there is nothing to train on.
        """
        stream.check()
        recipe = self.recipe
        self.stream = LengthGroups(stream, steps=recipe.length_group_steps, seed=recipe.seed)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes."""
        recipe = self.recipe
        per_process = recipe.batch_size * recipe.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    def window(self, step: int) -> Window:
        """The rows of the next optimizer step, number `step`, of all processes."""
        window = Window(
            self.stream.rows(self.rows_per_step),
            size=self.recipe.batch_size,
            budgets=self.budgets,
            step=step,
        )
        self.positions += window.positions
        return window

    def batches(self, window: Window) -> list[dict[str, Any]]:
        """This process's micro-batches of a window."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return [self.collate(rows) for rows in window.of_process(process, processes)]

    @abstractmethod
    def collate(
        self, rows: Sequence[Row | Talk], budgets: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Rows to one batch, their media cut down to `budgets` if given."""

    def state_dict(self) -> StreamState:
        """Everything that decides the rows to come."""
        state = self.stream.state_dict(self.rows_per_step)
        return state._replace(data={**state.data, "trained": self.positions})

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: if a source's documents have changed.
        """
        self.positions = state.data["trained"]
        self.stream.load_state_dict(state)


class Feed(BaseFeed):
    """A recipe's text and conversations, from their sources to batches.

    Args:
        recipe, model, accelerator: as for `BaseFeed`.
        processor: of the model; a copy is used, with the largest of the recipe's budgets.

    Raises:
        ConfigError: if the model takes no text, or its projectors have not the recipe's budgets.
        DataError: if there is nothing to train on.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: XoronModel,
        *,
        processor: XoronProcessor,
        accelerator: Accelerator,
    ) -> None:
        tokenizer, space = processor.tokenizer, processor.space
        if tokenizer is None or space is None or model.backbone is None:
            raise ConfigError(
                f"recipe {recipe.name!r} trains on text, and this model has no tokenizer or no"
                " backbone; compose one in (they come with: pip install xoron-llm)"
            )
        super().__init__(recipe, model, accelerator=accelerator)
        self.processor = copy.copy(processor)
        self.processor.budgets = {**processor.budgets, **self.budgets.largest}
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.bytes_of = token_bytes(tokenizer, space.size)
        self.talks = TalkMixture(recipe, self.processor)
        self.talks.require_codecs(model)
        self.tokenize = DocumentTokens(tokenizer)
        self.begin(TrainStream(recipe, self.tokenize, talks=self.talks.training))

    def collate(
        self, rows: Sequence[Row | Talk], budgets: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Rows to one batch, their media cut down to `budgets` if given."""
        rows = rows if budgets is None else [with_budget(row, budgets) for row in rows]
        return collate(rows, self.processor, pad_token_id=self.pad)
