"""What a recipe's mixture says about one source. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from xoron_core.config import Config

_KEYS_BY_KIND: dict[str, frozenset[str]] = {
    "files": frozenset({"pattern", "exclude"}),
    "text": frozenset({"sample_by", "streaming", "block_size"}),
    "jsonl": frozenset({"field", "streaming", "block_size"}),
    "parquet": frozenset({"field", "streaming", "block_size"}),
    "hf": frozenset({"field", "subset", "split", "streaming", "block_size"}),
    "conversations": frozenset({"field"}),
    "dataset": frozenset({"options"}),
    "shards": frozenset(),
}


class SourceConfig(Config):
    """One source of text documents or of conversations.

    Attributes:
        kind: of text: `files` (one document per file of a folder), `text`, `jsonl` or `parquet`
            (local files read by the `datasets` library) or `hf` (a data set of the Hugging Face
            Hub). Of conversations: `conversations` (local `.jsonl` or `.parquet` files with a
            column of chat messages, whose media are paths relative to the file's folder, bytes or
            `data:` URLs), `dataset` (a data set that an installed plug-in brings) or `shards` (a
            folder that `xoron tokens build` wrote, whose media are ids already).
        path: a folder for `files` (`stdlib` is the running Python's standard library), a file or
            a glob for the local kinds, a name for `hf` and `dataset`, a folder for `shards`.
        weight: share of the mixture's tokens, relative to the other sources; above 0. Positions
            that media take count as tokens.
        pattern: `files`: glob below the folder.
        exclude: `files`: globs, relative to the folder, of files to leave out.
        sample_by: `text`: what one document is.
        field: the column that holds the text (by default `text`) or the messages (`messages`).
        subset, split: `hf`: which part of the data set.
        streaming: read in order without preparing or counting the whole first. Documents are
            then shuffled in blocks of `block_size`.
        block_size: number of documents that are shuffled together while streaming.
        options: `dataset`: what its plug-in lets one choose.
    """

    kind: Literal["files", "text", "jsonl", "parquet", "hf", "conversations", "dataset", "shards"]
    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    pattern: str = "**/*.txt"
    exclude: tuple[str, ...] = ()
    sample_by: Literal["document", "paragraph", "line"] = "document"
    field: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    block_size: int = Field(default=1000, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_its_own_keys(self) -> Self:
        # Compared by value, not by presence: the resolved recipe in a run folder writes every key.
        common = {"kind", "path", "weight"}
        given = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        foreign = given - common - _KEYS_BY_KIND[self.kind]
        if foreign:
            raise ValueError(
                f"a source of kind {self.kind!r} takes no {', '.join(sorted(foreign))};"
                f" its keys are {', '.join(sorted(common | _KEYS_BY_KIND[self.kind]))}"
            )
        return self

    @property
    def holds_conversations(self) -> bool:
        """Whether it gives conversations, not text documents."""
        return self.kind in ("conversations", "dataset", "shards")

    @property
    def column(self) -> str:
        """The column that holds the text or the messages."""
        return self.field or ("messages" if self.kind == "conversations" else "text")
