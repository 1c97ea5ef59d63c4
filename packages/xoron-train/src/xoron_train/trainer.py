"""The training loop over optimizer steps, on accelerate.

One step: the whole accumulation window is fetched first, so that every loss's count over all
micro-batches and processes is known before the first forward pass; then each micro-batch adds its
part of the gradient; then clip, update, and forget the gradient.

Footguns:
- Only `model(...)` is wrapped by accelerate (autocast, DDP); counts come from the model itself.
- DDP averages gradients over processes, hence the factor `num_processes` on each loss.
- Every process makes the same number of forward passes per step, also in evaluation.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from xoron_core.errors import ConfigError, XoronError
from xoron_train import checkpoint as checkpoints
from xoron_train import rng
from xoron_train.checkpoint import Checkpoint
from xoron_train.data.batches import Window, to_device
from xoron_train.data.feed import BaseFeed, Feed
from xoron_train.data.media_feed import MediaFeed
from xoron_train.data.stream import StreamState
from xoron_train.deltas import Trained
from xoron_train.evaluate import count_bytes
from xoron_train.judge import Judge, MediaJudge
from xoron_train.losses import (
    check_counts,
    check_weights,
    global_counts,
    local_counts,
    sum_over_processes,
    weighted,
)
from xoron_train.metrics import MetricsLog, ProgressLine, bits_per_byte
from xoron_train.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from xoron_train.precision import cast_weights
from xoron_train.recipe import Recipe
from xoron_train.statistics import StepStatistics, part_metrics

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

logger = logging.getLogger("xoron.train")


class Trainer:
    """Trains one model with one recipe.

    Args:
        recipe: resolved.
        model: as loaded; its weights are changed in place.
        processor: its tokenizer and token space are used.
        accelerator: device, precision and processes.
        precision: as `precision.resolve_precision` gave it.
        fresh: whether the run begins; else `resume` is called next.

    Raises:
        ConfigError: for selectors that match nothing.
        DataError: if there is nothing to train or to evaluate on.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: XoronModel,
        *,
        processor: XoronProcessor,
        accelerator: Accelerator,
        precision: str,
        fresh: bool = True,
    ) -> None:
        self.recipe = recipe
        self.processor = processor
        self.accelerator = accelerator
        self.core = model
        self.step = 0
        self.elapsed = 0.0
        self.checked = False  # losses and their counts, against each other, in the first step
        self.chosen = Trained(model, recipe, processor=processor, fresh=fresh)
        self.feed, self.judge = self._data()
        self.space_hash = None if processor.space is None else processor.space.hash
        # What an assistant says is no document: see `evaluate.Score`.
        self.bytes_of = None if self.feed.talks.training else self.feed.bytes_of
        self.modality_of = {name: slot.modality for name, slot in model.composition.slots.items()}
        self.trained = self.chosen.parameters
        cast_weights(model, self.trained.values(), precision)
        if recipe.gradient_checkpointing:
            _recompute_activations(model)
        optimizer = build_optimizer(model, self.trained, recipe)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        rng.seed_all(recipe.seed + accelerator.process_index)

    def _data(self) -> tuple[BaseFeed, Judge]:
        """What the run is fed and judged with: sequences, or media alone."""
        common = {"processor": self.processor, "accelerator": self.accelerator}
        if self.chosen.media_slots:
            slots = self.chosen.media_slots
            media = MediaFeed(self.recipe, self.core, slots=slots, **common)
            return media, MediaJudge(self.recipe, media)
        feed = Feed(self.recipe, self.core, **common)
        return feed, Judge(self.recipe, feed)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restores everything that decides the steps to come; the weights are already loaded.

        Raises:
            FolderError, DataError: if the checkpoint does not fit the recipe or the data.
        """
        state = checkpoint.state
        self.step, self.elapsed = checkpoint.step, state["elapsed_seconds"]
        self.chosen.resume(checkpoint.folder)
        load_optimizer_tensors(
            self.optimizer.optimizer,
            self.trained,
            checkpoint.optimizer(),
            where=str(checkpoint.optimizer_path),
        )
        self.feed.load_state_dict(StreamState(state["data"], checkpoint.data()))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["processes"] == self.accelerator.num_processes:
            rng.restore(checkpoint.rng(self.accelerator.process_index))
        for key, now in self._machine().items():
            if state[key] != now:
                logger.warning(
                    "the checkpoint was written with %s %s, this process has %s: the run goes on,"
                    " but not bit for bit as it would have",
                    key,
                    state[key],
                    now,
                )

    def fit(self, run: Path, *, quiet: bool = False) -> dict[str, Any]:
        """Trains to the recipe's last step and returns the final evaluation's record.

        Args:
            run: folder for metrics and checkpoints.
            quiet: show no progress.

        Raises:
            XoronError: if the loss or the gradient is not finite.
            FolderError: if a checkpoint cannot be written.
        """
        main = self.accelerator.is_main_process
        log = self._log(run) if main else None
        progress = ProgressLine(
            self.recipe.max_steps, done=self.step, quiet=quiet or not main, unit=self.feed.unit
        )
        try:
            self._loop(run, log, progress)
            final = self._judge(last=True)
            if log is not None and final is not None:
                log.write(final)
        finally:
            progress.close()
            if log is not None:
                log.close()
        return final or {}

    def _log(self, run: Path) -> MetricsLog:
        recipe = self.recipe
        return MetricsLog(
            run, after=self.step, last=recipe.max_steps, tensorboard=recipe.tensorboard
        )

    def _loop(self, run: Path, log: MetricsLog | None, progress: ProgressLine) -> None:
        recipe = self.recipe
        begun, paid = time.monotonic(), self.elapsed
        seconds, before, items = 0.0, self.feed.positions, Counter[str]()
        while self.step < recipe.max_steps:
            at = time.monotonic()
            window = self.feed.window(self.step)
            record = self._train_step(window)
            self.step += 1
            seconds += time.monotonic() - at
            items += window.media(self.modality_of)
            self.elapsed = paid + time.monotonic() - begun
            last = self.step == recipe.max_steps
            if last or self.step % recipe.log_every == 0:
                speed = (self.feed.positions - before) / seconds
                record["elapsed_seconds"] = self.elapsed
                if self.feed.unit == "tokens":
                    record["tokens_per_second"] = speed
                if items:
                    rates = {name: count / seconds for name, count in sorted(items.items())}
                    record["items_per_second"] = rates
                progress.update(self.step, record["loss"], speed)
                if log is not None:
                    log.write(record)
                seconds, before, items = 0.0, self.feed.positions, Counter()
            if not last and recipe.eval_every and self.step % recipe.eval_every == 0:
                held_out = self._judge()
                if log is not None and held_out is not None:
                    log.write(held_out)
            if last or (recipe.save_every and self.step % recipe.save_every == 0):
                self._save(run, log)

    def _train_step(self, rows: Window) -> dict[str, Any]:
        recipe = self.recipe
        window = self.feed.batches(rows)
        counts = global_counts(local_counts(self.core, window), self.accelerator)
        if not self.checked:
            check_weights(recipe.loss_weights, counts)
        rate = set_learning_rate(self.optimizer, self.step, recipe)
        statistics = StepStatistics()
        sums = self._accumulate(window, counts, statistics)
        limit = recipe.max_grad_norm if recipe.max_grad_norm is not None else math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.trained.values()), limit))
        record = self._record(window, counts, sums)
        self._require_finite(record, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        observed = statistics.total(self.accelerator)
        self.core.after_optimizer_step(observed)
        if observed:
            record["parts"] = part_metrics(self.core, observed)
        record |= {"learning_rate": rate, "grad_norm": norm if math.isfinite(norm) else None}
        return record

    def _accumulate(
        self, window: list[dict[str, Any]], counts: dict[str, float], seen: StepStatistics
    ) -> dict[str, Tensor]:
        """Adds the window's gradient and statistics; returns this process's sum of each loss."""
        device = self.accelerator.device
        sums = {name: torch.zeros((), device=device) for name in counts}
        returned: dict[str, float] = {}
        self.model.train()
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self.model(**to_device(batch, device), **self.feed.options)
                terms = output.losses
                seen.add(output.statistics)
                loss = weighted(terms, counts, self.recipe.loss_weights)
                self.accelerator.backward(loss * self.accelerator.num_processes)
            for name in sums.keys() & terms.keys():
                sums[name] += terms[name].sum.detach()
            if not self.checked:
                for name, term in terms.items():
                    returned[name] = returned.get(name, 0.0) + float(term.count)
        if not self.checked:
            check_counts(local_counts(self.core, window), returned)
            self.checked = True
        return sums

    def _record(
        self, window: list[dict[str, Any]], counts: dict[str, float], sums: dict[str, Tensor]
    ) -> dict[str, Any]:
        names = sorted(sums)
        num_bytes = sum(count_bytes(batch, self.bytes_of) for batch in window)
        local = torch.tensor([float(sums[name]) for name in names] + [num_bytes]).double()
        *totals, all_bytes = sum_over_processes(local, self.accelerator)
        nats = dict(zip(names, totals, strict=True))
        means = {name: nats[name] / counts[name] if counts[name] else 0.0 for name in names}
        weights = self.recipe.loss_weights
        record = {
            "kind": "train",
            "step": self.step + 1,
            self.feed.unit: self.feed.positions,
            "loss": sum(weights.get(name, 1.0) * mean for name, mean in means.items()),
            "losses": means,
        }
        if self.feed.unit == "tokens":
            record["bits_per_byte"] = bits_per_byte(nats.get("text", 0.0), round(all_bytes))
        return record

    def _require_finite(self, record: dict[str, Any], norm: float) -> None:
        # With fp16 the scaler skips a step whose gradient overflowed and lowers its scale.
        scaled = self.accelerator.scaler is not None
        if math.isfinite(record["loss"]) and (math.isfinite(norm) or scaled):
            return
        raise XoronError(
            f"step {record['step']}: the loss is {record['loss']} and the gradient norm {norm};"
            f" expected finite numbers (losses: {record['losses']}). The weights were not updated"
            " with it and the last checkpoint is intact. Lower learning_rate or lengthen the"
            " warm-up; with precision: bf16 try fp32"
        )

    def _judge(self, *, last: bool = False) -> dict[str, Any] | None:
        return self.judge.record(self.model, self.core, step=self.step, last=last)

    def _save(self, run: Path, log: MetricsLog | None) -> None:
        generators = gather_object([rng.capture()])
        if log is not None:
            log.sync()
            data = self.feed.state_dict()
            scaler = self.accelerator.scaler
            checkpoints.write(
                run,
                self.step,
                trained=self.chosen,
                processor=self.processor,
                optimizer=optimizer_tensors(self.optimizer.optimizer, self.trained),
                data=data.tensors,
                rng=generators,
                state={
                    **self._machine(),
                    "recipe": self.recipe.data(),
                    "rows_per_step": self.feed.rows_per_step,
                    "token_space_hash": self.space_hash,
                    "elapsed_seconds": self.elapsed,
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "data": data.data,
                },
            )
            checkpoints.prune(run, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _machine(self) -> dict[str, Any]:
        """What exactness depends on beside the recipe; threads change the order of sums."""
        return {
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": self.accelerator.device.type,
            "torch": torch.__version__,
        }


def _recompute_activations(model: XoronModel) -> None:
    # Renamed during transformers 5; the old name goes away with 6.
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            "gradient_checkpointing: no part of this model can recompute its activations"
            f" ({error}); set gradient_checkpointing: false"
        ) from None
