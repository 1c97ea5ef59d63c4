"""Reads conversations ahead in processes of their own, in the order in which they will be taken.

Footguns:
- The state of a walk counts what was taken, not what was read ahead, so the number of workers
  changes neither what comes next nor how a run resumes.
- Tensors go from a worker as shared memory, at a file descriptor and some system calls each: items
  of many small tensors are pickled whole instead.
- A `DataLoader` draws its workers' seed from torch's global generator unless it has one of its own;
  that would change the training's randomness with the number of workers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from xoron_core.errors import XoronError

T = TypeVar("T")

_AHEAD = 8  # items per worker


class _Reads(Dataset[object]):
    """Calls a function by index; an error of ours is a result, so that it keeps its message."""

    def __init__(self, read: Callable[[int], object]) -> None:
        self.read = read

    def __getitem__(self, index: int) -> bytes:
        try:
            item = self.read(index)
        except XoronError as error:
            item = error
        return pickle.dumps(item, pickle.HIGHEST_PROTOCOL)


def read_ahead(read: Callable[[int], T], indices: Iterable[int], workers: int) -> Iterator[T]:
    """Yields `read(index)` of every index, in order.

    Args:
        read: without side effects that matter: it runs elsewhere.
        indices: what to read.
        workers: processes that read; 0 reads here, when an item is asked for.

    Raises:
        XoronError: as `read` does.
    """
    if not workers:
        yield from map(read, indices)
        return
    loader = DataLoader(
        _Reads(read),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=_AHEAD,
        # A forked worker inherits the loaders that exist, and warns with a traceback when it drops
        # them; it may also inherit a lock that another thread of torch holds.
        multiprocessing_context="forkserver",
        generator=torch.Generator(),
    )
    for sent in loader:
        item = pickle.loads(sent)  # noqa: S301  # from a process of our own
        if isinstance(item, XoronError):
            raise item
        yield cast(T, item)


def _as_it_is(item: object) -> object:
    """In place of the default, which makes tensors of arrays."""
    return item
