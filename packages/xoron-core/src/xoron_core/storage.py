"""Files that survive a crash: folders that appear whole or not at all, and safetensors.

`atomic_folder` writes aside, syncs, and renames; what stood at the path before stays until the new
folder is complete. Two renames are needed to replace a folder, so a kill between them leaves the
old one under `<name>.old`; `recover` puts it back, and every reader calls it first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xoron_core.errors import FolderError

if TYPE_CHECKING:
    from torch import Tensor

_ASIDE = ".partial"
_OLD = ".old"


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that replaces `path` when the block succeeds.

    Raises:
        FolderError: if writing fails; what stood at `path` is then untouched.
    """
    path = Path(path)
    recover(path)
    aside = path.with_name(f".{path.name}{_ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync_tree(aside)
        _swap(aside, path)
    except (OSError, FolderError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        # A writer of single files names the one aside, which means nothing to the user.
        reason = error.__cause__ if isinstance(error, FolderError) else error
        if not isinstance(reason, OSError):
            raise
        kept = f" What was at {path} before is intact." if path.exists() else ""
        raise FolderError(
            f"{path}: could not be written ({reason.strerror or reason}).{kept}"
            " Free some space or check the permissions, then run it again."
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that replaces `path` when the block succeeds.

    The folder is made if it is not there.

    Raises:
        FolderError: if writing fails; what stood at `path` is then untouched.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}{_ASIDE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise FolderError(
            f"{path}: could not be written ({error.strerror or error}). Free some space or check"
            " the permissions, then run it again."
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def recover(path: str | Path) -> None:
    """Finishes a replacement of `path` that was killed between its two renames."""
    path = Path(path)
    old = path.with_name(f".{path.name}{_OLD}")
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes contiguous copies of `tensors` as one safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    # safetensors lets the owner alone read it; whoever may read the folder may read the weights.
    path = Path(path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def link(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FolderError: if the file is missing, truncated or no safetensors file.
    """
    from safetensors.torch import load_file

    with _explained(path):
        return load_file(path)


def check_tensors(path: str | Path) -> None:
    """Opens a safetensors file's header, which also compares its size; reads no tensor.

    Raises:
        FolderError: as `read_tensors`.
    """
    from safetensors import safe_open

    with _explained(path), safe_open(path, framework="numpy"):
        pass


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise FolderError(f"{path}: is missing; copy the folder again, whole") from None
    except SafetensorError as error:
        raise FolderError(
            f"{path}: is truncated or not a safetensors file ({error}); copy it again"
        ) from None


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}{_OLD}")
    if path.exists():
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
