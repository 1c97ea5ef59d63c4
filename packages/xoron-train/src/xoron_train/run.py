"""A run: one folder, one recipe, one model, from its first step to the trained model folder.

    RUN/recipe.yaml      the resolved recipe
    RUN/metrics.jsonl    records of training and evaluation
    RUN/tensorboard/     the same for TensorBoard
    RUN/checkpoints/     model folders plus `trainer/`
    RUN/rows/            the trained vocabulary rows, with `rows`
    RUN/connector/       the trained slots alone, with `save_delta`
    RUN/adapter/         the adapter, with `lora`
    RUN/model/           the result

Nothing is written before the recipe, the model and the data have been found good.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xoron_core.errors import ConfigError, UsageError, XoronError
from xoron_core.storage import atomic_file
from xoron_train import checkpoint as checkpoints
from xoron_train.checkpoint import Checkpoint
from xoron_train.recipe import Recipe, differences, load_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor

logger = logging.getLogger("xoron.train")


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    Attributes:
        model_folder: the trained model.
        steps: optimizer steps in all.
        evaluation: the final record (`loss`, `bits_per_byte`, ..., `evaluations` by their names),
            empty if there was nothing to judge.
        seconds: spent by this process, loading and saving included.
        is_main: whether this process is the one that speaks for all.
    """

    model_folder: Path
    steps: int
    evaluation: dict[str, Any]
    seconds: float
    is_main: bool


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Trains a model folder with a recipe and writes a run folder.

    Args:
        recipe: as `load_recipe` returns it.
        output: the run's folder.
        model: the model folder to start from; on resume only its token space is compared.
        resume: go on from the newest complete checkpoint, or start if there is none.
        quiet: show no progress.

    Raises:
        UsageError: if `output` holds a run and `resume` is not given, or the other way round.
        ConfigError: if the recipe is not the one the run was started with, or fits nothing.
        FolderError, TokenSpaceError, DataError: for what is missing, damaged or does not fit.
        XoronError: if a required evaluation does not pass; the model is saved before.
    """
    from accelerate import Accelerator

    from xoron_core.api import save
    from xoron_train.precision import accelerate_name, resolve_precision
    from xoron_train.trainer import Trainer

    begun = time.monotonic()
    run = Path(output)
    precision = resolve_precision(recipe)
    accelerator = Accelerator(mixed_precision=accelerate_name(precision))
    _require_supported(accelerator)
    checkpoint = _find_start(run, recipe, resume=resume)
    if not accelerator.is_main_process:
        logger.setLevel(logging.ERROR)
    if recipe.requires and checkpoint is None and model is not None:
        from xoron_train.gates.requirement import require_passed

        require_passed(model, recipe.requires)
    loaded, processor = _load(model, checkpoint)
    trainer = Trainer(
        recipe,
        loaded,
        processor=processor,
        accelerator=accelerator,
        precision=precision,
        fresh=checkpoint is None,
    )
    if checkpoint is not None:
        _check_size(checkpoint, trainer.feed.rows_per_step)
        trainer.resume(checkpoint)
        logger.info("going on at step %d from %s", checkpoint.step, checkpoint.folder)
    # No process may write into the run's folder while another still looks whether it is empty.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_recipe(run, recipe)
    final = trainer.fit(run, quiet=quiet)
    folder = run / "model"
    if accelerator.is_main_process:
        trainer.chosen.finish(run)
        save(loaded, processor, folder)
    accelerator.wait_for_everyone()
    step, failed = trainer.step, trainer.judge.failures(final)
    # Process groups that are left to the interpreter's exit may abort it. Before them goes what DDP
    # made of the model: its reducer would free the group with Python's lock held and wait for a
    # thread of the group that waits for the lock.
    del trainer
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    if failed:
        raise XoronError(
            f"{folder}: the model is trained and saved, but required evaluations did not pass:"
            f" {'; '.join(failed)}"
        )
    return Result(folder, step, final, time.monotonic() - begun, accelerator.is_main_process)


def _require_supported(accelerator: Accelerator) -> None:
    from accelerate.utils import DistributedType

    kinds = (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
        DistributedType.XLA,
    )
    if accelerator.distributed_type in kinds:
        raise ConfigError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this version trains in"
            " one process or with DDP (accelerate launch --multi_gpu, or torchrun)"
        )


def _find_start(run: Path, recipe: Recipe, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start at step 0."""
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: is a file; expected a folder for the run")
    used = run.is_dir() and any(run.iterdir())
    if not used:
        return None
    if not resume:
        raise UsageError(
            f"{run}: is not empty; go on with its run by --resume, or choose another folder"
        )
    written = run / "recipe.yaml"
    if not written.is_file():
        raise UsageError(
            f"{run}: is no run's folder (it has no recipe.yaml), so nothing can resume"
        )
    checkpoint = checkpoints.latest(run)
    before = checkpoint.state["recipe"] if checkpoint else load_recipe(str(written)).data()
    if changed := differences(before, recipe.data()):
        raise ConfigError(
            f"{run}: was started with another recipe, which differs in {'; '.join(changed)}."
            f" Resume with {written}, or start a new run"
        )
    return checkpoint


def _load(
    model: str | Path | None, checkpoint: Checkpoint | None
) -> tuple[XoronModel, XoronProcessor]:
    from xoron_core.api import load
    from xoron_core.folder import read_config

    # Read first even where it is only compared: `load` would ask the Hub for an absent folder.
    config = None if model is None else read_config(model)[0]
    if checkpoint is None:
        if model is None:
            raise UsageError("no checkpoint to resume from, so --model must name a model folder")
        return load(model)
    if config is not None:
        checkpoint.require_space(config.token_space_hash, where=str(model))
    loaded, processor = load(checkpoint.folder)
    found = None if processor.space is None else processor.space.hash
    checkpoint.require_space(found, where=checkpoint.folder)
    return loaded, processor


def _check_size(checkpoint: Checkpoint, rows_per_step: int) -> None:
    before = checkpoint.state["rows_per_step"]
    if before != rows_per_step:
        raise ConfigError(
            f"one optimizer step of this run takes {before} rows, now batch_size *"
            f" gradient_accumulation_steps * processes is {rows_per_step}; change one of them so"
            f" that the product is {before} again"
        )


def _write_recipe(run: Path, recipe: Recipe) -> None:
    with atomic_file(run / "recipe.yaml") as aside:
        text = yaml.safe_dump(recipe.data(), sort_keys=False, allow_unicode=True)
        aside.write_text(text, encoding="utf-8")
