"""Checkpoints that survive a crash at any moment.

A checkpoint is a model folder plus `trainer/`:

    trainer/state.json             step, recipe, data cursors, token space, list of all files
    trainer/optimizer.safetensors  `<parameter name>/<state name>`
    trainer/adapter.safetensors    the adapter, with `lora`; the model folder holds its base
    trainer/rows.safetensors       trained vocabulary rows in fp32, with `rows`
    trainer/losses.safetensors     trained parameters of losses, which model folders do not hold
    trainer/data.safetensors       tokens that are packed in no row yet
    trainer/rng-00000.safetensors  random generators, one file per process

It is written beside its place, synced and renamed. `state.json` lists every other file with its
size, so a folder that was copied only in part is told from a complete one. Older checkpoints are
removed only after a new one stands. Slots that the run leaves as they are are written once; later
checkpoints share their files by hard links.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xoron_core.errors import FolderError, TokenSpaceError
from xoron_core.storage import atomic_folder, read_tensors, recover, write_tensors

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor
    from xoron_train.deltas import Trained

logger = logging.getLogger("xoron.train")

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_STATE = "trainer/state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: a model folder that `xoron_core.load` opens.
        step: optimizer steps done.
        state: the contents of `trainer/state.json`.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter name."""
        return read_tensors(self.optimizer_path)

    @property
    def optimizer_path(self) -> Path:
        """File of the optimizer's state, for errors."""
        return self.folder / "trainer/optimizer.safetensors"

    def data(self) -> dict[str, Tensor]:
        """Tokens that were packed in no row yet."""
        return read_tensors(self.folder / "trainer/data.safetensors")

    def rng(self, process: int) -> dict[str, Tensor]:
        """Random generators of one process."""
        return read_tensors(self.folder / _rng_name(process))

    def require_space(self, found: str | None, *, where: str | Path) -> None:
        """Refuses a token space other than the one this run trains.

        Raises:
            TokenSpaceError: naming both hashes.
        """
        own = self.state["token_space_hash"]
        if found != own:
            raise TokenSpaceError(
                f"{where}: has token space {found}, but the run at {self.folder} trains with {own};"
                " resume with the model the run was started with, or start a new run"
            )


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def write(
    run: Path,
    step: int,
    *,
    trained: Trained,
    processor: XoronProcessor,
    optimizer: dict[str, Tensor],
    data: dict[str, Tensor],
    rng: Sequence[dict[str, Tensor]],
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of one step, whole or not at all.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        trained, processor: saved as a model folder, an adapter beside it.
        optimizer: as `optim.optimizer_tensors` gives it.
        data: the packer's tensors.
        rng: generators per process.
        state: plain data kept in `state.json`.

    Returns:
        The checkpoint's folder.

    Raises:
        FolderError: if writing fails; earlier checkpoints are intact.
    """
    folder = checkpoints_folder(run) / f"step-{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as aside:
        (aside / "trainer").mkdir()
        trained.write(aside)
        processor.save_pretrained(aside)
        write_tensors(aside / "trainer/optimizer.safetensors", optimizer)
        write_tensors(aside / "trainer/data.safetensors", data)
        for process, tensors in enumerate(rng):
            write_tensors(aside / _rng_name(process), tensors)
        files = {
            path.relative_to(aside).as_posix(): path.stat().st_size
            for path in sorted(aside.rglob("*"))
            if path.is_file()
        }
        record = {"format": FORMAT, "step": step, **state, "files": files}
        (aside / _STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    trained.written(folder)
    return folder


def latest(run: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint of a run, or None if there is none.

    Incomplete ones are passed over with a warning that says what they lack.
    """
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return None
    _finish_replacements(folder)
    for path in sorted(_stepped(folder), reverse=True):
        checkpoint, lack = _open(path)
        if checkpoint is not None:
            return checkpoint
        logger.warning("%s is incomplete (%s); trying the one before it", path, lack)
    return None


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and what interrupted writes left behind."""
    folder = checkpoints_folder(run)
    _finish_replacements(folder)
    for path in sorted(_stepped(folder))[:-keep]:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        path.rename(path.with_name(f".{path.name}.pruned"))
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _finish_replacements(folder: Path) -> None:
    for path in folder.glob(".step-*.old"):
        recover(folder / path.name.removeprefix(".").removesuffix(".old"))


def _stepped(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]


def _open(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or what it lacks."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"it has no {_STATE}"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None, f"its {_STATE} is damaged"
    if state.get("format") != FORMAT:
        raise FolderError(
            f"{path}: has checkpoint format {state.get('format')!r}, this xoron-train reads"
            f" {FORMAT}; resume with the version that wrote it"
        )
    for name, size in state["files"].items():
        file = path / name
        if not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != size:
            return None, f"{name} has {file.stat().st_size} bytes, expected {size}"
    return Checkpoint(path, state["step"], state), ""


def _rng_name(process: int) -> str:
    return f"trainer/rng-{process:05d}.safetensors"
