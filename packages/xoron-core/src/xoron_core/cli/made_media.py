"""What `xoron generate --make` has made: into a file, and in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xoron_core.errors import FolderError, PluginError
from xoron_core.events import MediaOut
from xoron_core.storage import write_tensors


class MadeMedia:
    """The media of one answer, as tensors named `image.0`, `image.1`, `audio.0`, ..."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, event: MediaOut) -> None:
        """Adds a medium, as its codec's `decode` or its generator's `sample` gave it.

        Raises:
            PluginError: if that is no array of numbers.
        """
        medium: Any = event.media
        try:
            tensor = torch.as_tensor(medium)
        except (TypeError, ValueError, RuntimeError):
            raise PluginError(
                f"{event.modality} is made as {type(medium).__name__}, which is no array and cannot"
                " be written here; use xoron_core.Session"
            ) from None
        number = sum(name.startswith(f"{event.modality}.") for name in self.tensors)
        self.tensors[f"{event.modality}.{number}"] = tensor.cpu()

    def data(self) -> list[dict[str, Any]]:
        """Name and shape of each, in order."""
        return [{"name": n, "shape": list(tensor.shape)} for n, tensor in self.tensors.items()]

    def write(self, path: Path) -> None:
        """Writes all of them as one safetensors file.

        Raises:
            FolderError: if that fails.
        """
        try:
            write_tensors(path, self.tensors)
        except OSError as error:
            raise FolderError(f"{path}: cannot be written ({error})") from None
