"""The folder of tokenised conversations, and `shards.json`, which says what they were made of.

    shard-00000.parquet, ...  a row for each conversation (see `rows`)
    token_space.json          what the ids mean
    shards.json               written last: a folder without it is not complete

Every shard carries the settings that decide its bytes, so that a build that was killed can tell
which of its shards stand. `shards.json` has them once more, with counts and each shard's hash.

Footgun: the hashes find mistakes and damage. They are no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from xoron_core.config import Config, Source
from xoron_core.descriptors import Modality
from xoron_core.errors import FolderError
from xoron_core.storage import atomic_file

RECORD = "shards.json"
FORMAT = 1


class CodecRecord(Config):
    """A codec that ids were made with.

    Attributes:
        use: `kind/name` of its component.
        config: resolved; sizes and preprocessing.
        weights: identity of its tensors (`xoron_core.identity`).
        name: of its ranges in the token space.
        frames: the fewest and the most of what is made.
    """

    use: str
    config: dict[str, Any]
    weights: str
    name: str
    frames: tuple[int, int]


class MarkerRecord(Config):
    """The strings of a modality's special tokens, as the composition chose them."""

    begin: str
    end: str
    gen_begin: str
    gen_end: str
    placeholder: str


class Settings(Config):
    """All that decides the bytes of the shards. No path, time or number of workers is among it.

    Attributes:
        format: of the folder.
        token_space_hash: what the ids mean.
        tokenizer_hash: of the tokenizer and its chat template.
        codecs: by slot.
        markers: by modality.
        kind: of the source, `dataset` or `conversations`.
        column: that holds the messages, for `conversations`.
        options: of the data set, for `dataset`.
        parts: the splits of the source in their order, and how many conversations were taken of
            each; a local table has one part without a name.
        fingerprint: of the source.
        eval_fraction: share of the media that is held out; None where the source brings splits.
        max_length: most positions of a conversation, None for any number.
        shard_size: conversations of the source that a shard covers.
        batch_size: conversations whose media are encoded together.
    """

    format: int
    token_space_hash: str
    tokenizer_hash: str
    codecs: dict[str, CodecRecord]
    markers: dict[str, MarkerRecord]
    kind: str
    column: str
    options: dict[str, Any]
    parts: tuple[tuple[str, int], ...]
    fingerprint: str
    eval_fraction: float | None = Field(ge=0, le=0.5)
    max_length: int | None = Field(ge=2)
    shard_size: int = Field(ge=1)
    batch_size: int = Field(ge=1)

    def modalities(self) -> dict[str, Modality]:
        """What spans are told apart by; loading media takes the plug-ins' own."""
        return {
            name: Modality(name, (), **found.data(), load="")
            for name, found in self.markers.items()
        }


class ShardRecord(Config):
    """One file: its name, the sha256 of its bytes, and how many rows it has."""

    file: str
    sha256: str
    rows: int


class ShardsRecord(Config):
    """The contents of shards.json.

    Attributes:
        settings: that decided the shards.
        path: of the source: the name of a data set, or a path or glob.
        splits: rows by split.
        tasks: rows by task, such as `text->image`.
        positions: ids in all rows.
        unreadable: conversations that could not be read or laid out, with the reason.
        left_out: how many are on neither side of the split.
        shards: the files, in order.
    """

    settings: Settings
    path: str
    splits: dict[str, int]
    tasks: dict[str, int]
    positions: int
    unreadable: dict[str, str]
    left_out: int
    shards: tuple[ShardRecord, ...]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.parquet"


def holds_shards(folder: str | Path) -> bool:
    """Whether a folder holds complete shards."""
    return (Path(folder) / RECORD).is_file()


def read_record(folder: str | Path) -> ShardsRecord:
    """Reads shards.json.

    Raises:
        FolderError: if the folder holds no complete shards, or shards of another format.
        ConfigError: for keys or values that do not belong there.
    """
    path = Path(folder) / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise FolderError(
            f"{folder}: holds no complete shards (it has no {RECORD}); `xoron tokens build -o"
            f" {folder}` writes them, and goes on where it was interrupted"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); copy it again") from None
    found = data.get("settings", {}).get("format") if isinstance(data, Mapping) else None
    if found != FORMAT:
        raise FolderError(
            f"{path}: format {found!r}, this xoron-train reads {FORMAT}; build the shards again or"
            " upgrade with: pip install -U xoron-train"
        )
    return ShardsRecord.parse(data, Source(str(path)))


def write_record(folder: Path, record: ShardsRecord) -> None:
    """Writes shards.json, whole or not at all.

    Raises:
        FolderError: if that fails.
    """
    text = json.dumps(record.data(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_file(folder / RECORD) as aside:
        aside.write_text(text, encoding="utf-8")


def file_hash(path: Path) -> str:
    """`sha256:...` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def changed(old: Settings, new: Settings) -> str:
    """The settings that differ, with both values, for an error."""
    before, after = old.data(), new.data()
    return "; ".join(
        f"{key} was {_short(before[key])}, now {_short(after[key])}"
        for key in before
        if before[key] != after[key]
    )


def _short(value: Any, limit: int = 90) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
