"""What `xoron generate --make` has made: into a file, and in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xoron_core.errors import FolderError, PluginError
from xoron_core.events import MediaOut
from xoron_core.storage import write_tensors


class MadeMedia:
    """The media of one answer, as tensors named `image.0`, `image.1`, ...

    A medium of several fields has one for each: `audio.0.samples`, `audio.0.rate`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.count: Counter[str] = Counter()

    def add(self, event: MediaOut) -> None:
        """Adds a medium, as its codec's `decode` or its generator's `sample` gave it.

        Raises:
            PluginError: if that is no array of numbers.
        """
        name = f"{event.modality}.{self.count[event.modality]}"
        try:
            found = _tensors(event.media, name)
        except (TypeError, ValueError, RuntimeError):
            raise PluginError(
                f"{event.modality} is made as {type(event.media).__name__}, which is no array and"
                " cannot be written here; use xoron_core.Session"
            ) from None
        self.count[event.modality] += 1
        self.tensors |= found

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


def _tensors(medium: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a medium; codecs that make media of many lengths give a list of one."""
    if isinstance(medium, list) and len(medium) == 1:
        medium = medium[0]
    if hasattr(medium, "_asdict"):
        fields = medium._asdict().items()
        return {f"{name}.{field}": torch.as_tensor(value).cpu() for field, value in fields}
    return {name: torch.as_tensor(medium).cpu()}
