"""Training from shards: their rows are sequence plans whose codes are known, so no codec runs.

Rows keep the side of the split that they were written with. They are read through `datasets`, which
maps them from disk, so that their number is not bounded by memory.

Footgun: opening compares the token space, the codecs and the number of rows, not the hash of every
file; that is what `xoron tokens audit` is for.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xoron_core.errors import DataError
from xoron_core.identity import identities, model_weights
from xoron_core.sequence import Plan
from xoron_core.tokens.space import TokenSpace
from xoron_train.conversation import TRAIN
from xoron_train.data.sources import IndexedSource, UnreadableError
from xoron_train.data.talks import GOLDEN, Talk
from xoron_train.shards.record import read_record

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

logger = logging.getLogger("xoron.train")

_COLUMNS = ["name", "split", "digests", "input_ids", "learned", "media_labels"]


class ShardSource(IndexedSource[Talk]):
    """The rows of a folder of shards that are on one side of the split.

    Args:
        name: of the source.
        folder: as `xoron tokens build` wrote it.
        space: the token space of the model that is trained.
        wanted: the side that is read.
        length: the most positions that a row may take.
        golden: digests of media that are kept out of training.

    Raises:
        TokenSpaceError: if the shards were made with another token space, with both hashes.
        FolderError: if the folder is incomplete.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        *,
        space: TokenSpace,
        wanted: str,
        length: int,
        golden: frozenset[bytes] = frozenset(),
    ) -> None:
        self.name = name
        self.record = read_record(folder)
        space.require_same(self.record.settings.token_space_hash, where=str(folder))
        self.wanted = wanted
        self.length = length
        files = [str(Path(folder) / shard.file) for shard in self.record.shards if shard.rows]
        self.table = _table(name, files, rows=self.record.rows)
        self.sides = np.array(self.table["split"].to_pylist(), dtype=object)
        self._keep_out({digest.hex() for digest in golden})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have rows."""
        return tuple(self.record.splits)

    def other_side(self, wanted: str) -> ShardSource:
        """The same rows read for another side."""
        other = copy.copy(self)
        other.wanted = wanted
        return other

    def require_codecs(self, model: XoronModel) -> None:
        """Refuses a model whose codecs would not have made these ids, or not make these media.

        Raises:
            DataError: naming the slot and both identities.
        """
        made_with = self.record.settings.codecs
        weights = {slot: w for slot, w in model_weights(model).items() if slot in made_with}
        found = identities(weights)
        for slot, codec in made_with.items():
            if found.get(slot) != codec.weights:
                raise DataError(
                    f"mixture.{self.name}: its ids were made with {codec.weights} in {slot!r}, and"
                    f" the model has {found.get(slot, 'nothing')} there; the same ids mean other"
                    " media. Train the model that they were made with, or build them again with"
                    " this one"
                )

    def __len__(self) -> int:
        return len(self.sides)

    def read(self, index: int) -> Talk:
        side = self.sides[index]
        if side != self.wanted:
            return Talk(f"{self.name}[{index}]", side)
        name = self.table["name"][index].as_py()
        ids = self.table["input_ids"][index].values.to_numpy()
        if len(ids) > self.length:
            raise UnreadableError(
                name, f"takes {len(ids)} positions, more than sequence_length={self.length}"
            )
        learned = self.table["learned"][index].values.to_numpy(zero_copy_only=False)
        labels = {at["position"]: at["id"] for at in self.table["media_labels"][index].as_py()}
        plan = Plan(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(learned.astype(bool)),
            labels=labels,
        )
        return Talk(name, side, plan=plan)

    def fingerprint(self) -> str:
        hashes = "".join(shard.sha256 for shard in self.record.shards)
        return hashlib.blake2b(hashes.encode(), digest_size=8).hexdigest()

    def _keep_out(self, golden: set[str]) -> None:
        """Marks training rows that hold a medium of the golden set."""
        if not golden:
            return
        digests = self.table["digests"].to_pylist()
        held = [index for index, row in enumerate(digests) if golden.intersection(row)]
        kept = [index for index in held if self.sides[index] == TRAIN]
        self.sides[kept] = GOLDEN
        if kept:
            logger.info(
                "mixture.%s: kept %d rows out of training: they hold media of the golden set",
                self.name,
                len(kept),
            )


def _table(name: str, files: list[str], *, rows: int) -> Any:
    """The rows of the files, mapped from disk."""
    import datasets
    from datasets.exceptions import DatasetsError

    if not files:
        raise DataError(f"mixture.{name}: its shards hold no row")
    datasets.utils.logging.disable_progress_bar()
    try:
        table = datasets.Dataset.from_parquet(files, columns=_COLUMNS).data.table
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"mixture.{name}: its shards cannot be opened ({error}); run: xoron tokens audit"
        ) from None
    if table.num_rows != rows:
        raise DataError(
            f"mixture.{name}: its shards hold {table.num_rows} rows, their record says {rows}; run:"
            " xoron tokens audit"
        )
    return table
