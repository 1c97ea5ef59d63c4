"""Judges the model between steps: its loss on what is held out, and the recipe's evaluations.

Footguns:
- The held-out loss is shared out over the processes. Evaluations run on the main process, on the
  model itself; the others wait.
- Nothing here moves a random generator or the model's weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xoron_core.errors import DataError, XoronError
from xoron_train import rng
from xoron_train.data.feed import BaseFeed
from xoron_train.data.packing import Row
from xoron_train.data.stream import held_out_rows
from xoron_train.evaluate import Score, evaluate
from xoron_train.evaluate_media import MediaScore, evaluate_media
from xoron_train.evaluation_entries import Entry, build_evaluations
from xoron_train.recipe import Recipe

if TYPE_CHECKING:
    from xoron_core.model import XoronModel


class Judge:
    """What a recipe holds out and how it judges.

    Args:
        recipe: resolved.
        feed: its data.

    Raises:
        DataError: if a source has nothing to judge on.
        ConfigError, UsageError: for evaluations that are wrong or unknown.
    """

    def __init__(self, recipe: Recipe, feed: BaseFeed) -> None:
        self.recipe = recipe
        self.feed = feed
        self.accelerator = feed.accelerator
        self.entries = build_evaluations(recipe.evaluations)
        self.texts = self._texts(recipe.eval_batches)
        self._require_talks()

    def record(
        self, model: nn.Module, core: XoronModel, *, step: int, last: bool = False
    ) -> dict[str, Any] | None:
        """Judges the model and returns the record for the log, None if there is nothing to judge.

        Args:
            model: as prepared by the accelerator.
            core: the model itself.
            step: optimizer steps done.
            last: whether this is the end of the run.

        Raises:
            XoronError: if the loss is not finite.
        """
        record: dict[str, Any] = {"kind": "eval", "step": step}
        if self.recipe.eval_fraction:
            record |= self._held_out_loss(model, step, last=last)
        if found := self._evaluations(core, last=last):
            record["evaluations"] = found
        return record if len(record) > 2 else None

    def failures(self, record: Mapping[str, Any]) -> list[str]:
        """The required evaluations that did not pass, with their figures."""
        found = record.get("evaluations", {})
        return [
            f"{entry.name}: {json.dumps(found[entry.name])}"
            for entry in self.entries
            if entry.config.required and found and found[entry.name].get("passed") is not True
        ]

    def _held_out_loss(self, model: nn.Module, step: int, *, last: bool) -> dict[str, Any]:
        batches = self.recipe.final_eval_batches if last else self.recipe.eval_batches
        scores = self._scores(model, batches, self.feed.budgets.largest)
        total = sum(scores.values(), Score()).record()
        record: dict[str, Any] = dict(total)
        if len(scores) > 1:
            record["sources"] = {name: score.record() for name, score in scores.items()}
        if last and (by_budget := self._loss_by_budget(model, batches)):
            record["budgets"] = by_budget
        if not math.isfinite(total["loss"]):
            raise XoronError(f"step {step}: the held-out loss is {total['loss']}")
        return record

    def _loss_by_budget(self, model: nn.Module, batches: int | None) -> dict[str, Any]:
        """The loss on held-out conversations by slot and number of positions."""
        found: dict[str, dict[str, float]] = {}
        for slot, count, budgets in self.feed.budgets.each():
            scores = self._scores(model, batches, budgets, text=False)
            loss = sum(scores.values(), Score()).record()["loss"]
            found.setdefault(slot, {})[str(count)] = loss
        return found

    def _scores(
        self,
        model: nn.Module,
        batches: int | None,
        budgets: Mapping[str, int],
        *,
        text: bool = True,
    ) -> dict[str, Score]:
        kept = batches == self.recipe.eval_batches
        texts: Mapping[str, list[Row]] = {}
        if text:
            texts = self.texts if kept else self._texts(batches)
        scores = {}
        for name, config in self.recipe.mixture.items():
            if not config.holds_conversations and not text:
                continue
            talks = config.holds_conversations
            scores[name] = evaluate(
                model,
                self.feed.talks.held_out(name, self._limit(batches)) if talks else texts[name],
                batch_size=self.recipe.batch_size,
                collate=lambda rows: self.feed.collate(rows, budgets),
                bytes_of=None if talks else self.feed.bytes_of,
                accelerator=self.accelerator,
                options=self.feed.options,
            )
        return scores

    def _limit(self, batches: int | None) -> int | None:
        return None if batches is None else batches * self.recipe.batch_size

    def _texts(self, batches: int | None) -> dict[str, list[Row]]:
        if not self.recipe.eval_fraction or self.feed.tokenize is None:
            return {}
        rows = {
            name: held_out_rows(self.recipe, name, self.feed.tokenize, limit=self._limit(batches))
            for name, config in self.recipe.mixture.items()
            if not config.holds_conversations
        }
        for name, found in rows.items():
            if not found:
                raise DataError(_NOTHING.format(name=name, share=self.recipe.eval_fraction))
        return rows

    def _require_talks(self) -> None:
        for name in self.feed.talks.training if self.recipe.eval_fraction else ():
            if next(self.feed.talks.held_out(name, 1), None) is None:
                raise DataError(_NOTHING.format(name=name, share=self.recipe.eval_fraction))

    def _evaluations(self, core: XoronModel, *, last: bool) -> dict[str, Any]:
        wanted = [entry for entry in self.entries if last or entry.every]
        found: dict[str, Any] = {}
        if not wanted:
            return found
        if self.accelerator.is_main_process:
            before, was_training = rng.capture(), core.training
            core.eval()
            with torch.no_grad(), self.accelerator.autocast():
                found = {entry.name: self._run(entry, core) for entry in wanted}
            core.train(was_training)
            rng.restore(before)
        self.accelerator.wait_for_everyone()
        return found

    def _run(self, entry: Entry, core: XoronModel) -> dict[str, Any]:
        config = entry.config
        try:
            samples = self.feed.talks.samples(config.source, config.split, config.samples)
            result = entry.evaluation.run(core, self.feed.processor, samples)
        except XoronError as error:
            raise type(error)(f"evaluations.{entry.name}: {error}") from error
        try:
            json.dumps(result, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise XoronError(
                f"evaluations.{entry.name}: {type(entry.evaluation).__name__} returned what is no"
                f" plain data of finite numbers ({error})"
            ) from None
        return result


class MediaJudge(Judge):
    """The same for a run that trains on media alone: the held-out loss is a mean of each loss."""

    def _held_out_loss(self, model: nn.Module, step: int, *, last: bool) -> dict[str, Any]:
        batches = self.recipe.final_eval_batches if last else self.recipe.eval_batches
        scores = {
            name: evaluate_media(
                model,
                self.feed.talks.held_out(name, self._limit(batches)),
                batch_size=self.recipe.batch_size,
                collate=self.feed.collate,
                accelerator=self.accelerator,
            )
            for name in self.recipe.mixture
        }
        weights = self.recipe.loss_weights
        record = sum(scores.values(), MediaScore()).record(weights)
        if len(scores) > 1:
            record["sources"] = {name: score.record(weights) for name, score in scores.items()}
        if not math.isfinite(record["loss"]):
            raise XoronError(f"step {step}: the held-out loss is {record['loss']}")
        return record


_NOTHING = (
    "mixture.{name}: eval_fraction={share} holds out no document; raise it, add documents, or"
    " evaluate nothing (eval_fraction: 0)"
)
