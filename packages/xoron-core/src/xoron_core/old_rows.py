"""The old form of trained vocabulary rows: `trainable_rows.pt` beside a `trainable_rows.json`.

It is read as data alone and never run. It names no base, so the caller has to vouch for it. What it
says was never fixed; read are
- of the JSON `rows`, a list of [start, stop], or `base_vocab_size` and `vocab_size`; and
  `token_space_hash`, which must be the model's if it is there;
- of the tensors the one with `embed` in its name, and the one with `head` where the model's head is
  not tied.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xoron_core.errors import FolderError

RECORD = "trainable_rows.json"
TENSORS = "trainable_rows.pt"
Rows = tuple[tuple[int, int], ...]


def read(folder: Path, matrices: Iterable[str]) -> tuple[Rows, dict[str, Tensor], str | None]:
    """Reads rows of the old form.

    Args:
        folder: where both files lie.
        matrices: names of the embedding's and, if it has its own, the head's matrix.

    Returns:
        The rows as ranges, their tensors by matrix, and the token space's hash if one is given.

    Raises:
        FolderError: if a file is missing, or holds anything but rows.
    """
    record = _record(folder / RECORD)
    found = _tensors(folder / TENSORS)
    words = dict(zip(matrices, ("embed", "head"), strict=False))
    tensors = {name: _one(folder / TENSORS, found, word) for name, word in words.items()}
    return record["rows"], tensors, record.get("token_space_hash")


def check_ranges(path: Path, rows: Any) -> None:
    """Refuses what are no ascending ranges of ids.

    Raises:
        FolderError: with what the file says.
    """
    flat: list[int] = [x for pair in rows for x in pair] if _are_pairs(rows) else []
    filled = all(start < stop for start, stop in zip(flat[::2], flat[1::2], strict=True))
    if not flat or flat[0] < 0 or not filled or flat != sorted(flat):
        raise FolderError(
            f"{path}: does not say which rows it holds; expected rows: [[start, stop], ...],"
            f" ascending (the old form also has base_vocab_size and vocab_size), got {rows!r}"
        )


def _are_pairs(rows: Any) -> bool:
    return isinstance(rows, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(x) is int for x in pair)
        for pair in rows
    )


def _tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FolderError(f"{path}: is missing; copy the folder again, whole") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FolderError(
            f"{path}: is not plain tensors, and nothing else is read from it ({reason}); ask its"
            " author for safetensors"
        ) from None


def _record(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path}: is missing; copy the folder again, whole") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); copy it again") from None
    data = data if isinstance(data, dict) else {}
    if "rows" not in data and "vocab_size" in data and "base_vocab_size" in data:
        data["rows"] = [[data["base_vocab_size"], data["vocab_size"]]]
    rows: Any = data.get("rows")
    check_ranges(path, rows)
    return data | {"rows": tuple((start, stop) for start, stop in rows)}


def _one(path: Path, found: Any, word: str) -> Tensor:
    """The one tensor with this word in its name."""
    named = {n: t for n, t in found.items() if word in str(n)} if isinstance(found, dict) else {}
    if len(named) != 1 or not isinstance(tensor := next(iter(named.values())), Tensor):
        names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise FolderError(
            f"{path}: expected one tensor with {word!r} in its name, got {names or 'none'}"
        )
    return tensor
