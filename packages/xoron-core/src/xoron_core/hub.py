"""Checkpoints on the Hugging Face Hub: whether they can be had, asked before memory is taken."""

from __future__ import annotations

from pathlib import Path

from xoron_core.errors import FolderError

# One of them lies in every safetensors checkpoint; a large one has the index.
_FILES = ("model.safetensors.index.json", "model.safetensors")


def need_weights(path: str, what: str) -> None:
    """Makes sure that a name on the Hub can be fetched; a folder is left to whoever reads it.

    Args:
        path: a folder or a Hub name.
        what: names the part in the error.

    Raises:
        FolderError: if it can be neither fetched nor found in the Hub's cache.
    """
    if Path(path).is_dir():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
    )

    problems: list[Exception] = []
    for file in _FILES:
        try:
            hf_hub_download(path, file, local_files_only=bool(problems))  # waits for a net once
        except RemoteEntryNotFoundError:
            continue  # it is there, in another layout
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            problems.append(error)
        else:
            return
    if problems:
        reason = (str(problems[0]).strip() or type(problems[0]).__name__).splitlines()[0]
        raise FolderError(
            f"{what}: {path!r} is no folder here and its weights cannot be fetched from the Hub"
            f" ({reason}); give a folder as path, or compose while online"
        )
