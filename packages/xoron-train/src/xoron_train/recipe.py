"""A recipe: one training stage as data: what is trained, on what mixture, how long.

A recipe comes from a plug-in by name or from a YAML file by path, with `--set a.b=c` overrides on
top. What `load_recipe` returns is resolved: paths are absolute, so that the copy kept beside a run
means the same from any directory.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from xoron_core.config import Config, Source, apply_overrides, parse_yaml, read_yaml
from xoron_core.errors import UsageError, did_you_mean
from xoron_core.plugins import registry
from xoron_train.hookspecs import RecipeFile

# Keys a run may change between its start and a resume: they decide what is shown and kept, not
# what is learned. The two sizes may change too as long as their product with the number of
# processes, the rows of one optimizer step, stays.
OBSERVING_KEYS = frozenset(
    {
        "description",
        "log_every",
        "eval_every",
        "eval_batches",
        "final_eval_batches",
        "save_every",
        "keep_checkpoints",
        "tensorboard",
    }
)
SIZE_KEYS = frozenset({"batch_size", "gradient_accumulation_steps"})

_KEYS_BY_KIND: dict[str, frozenset[str]] = {
    "files": frozenset({"pattern", "exclude"}),
    "text": frozenset({"sample_by", "streaming", "block_size"}),
    "jsonl": frozenset({"field", "streaming", "block_size"}),
    "parquet": frozenset({"field", "streaming", "block_size"}),
    "hf": frozenset({"field", "subset", "split", "streaming", "block_size"}),
}


class SourceConfig(Config):
    """One source of text documents.

    Attributes:
        kind: `files` (one document per file of a folder), `text`, `jsonl` or `parquet` (local
            files read by the `datasets` library) or `hf` (a data set of the Hugging Face Hub).
        path: a folder for `files` (`stdlib` is the running Python's standard library), a file or
            a glob for the local kinds, a name for `hf`.
        weight: share of the mixture's tokens, relative to the other sources; above 0.
        pattern: `files`: glob below the folder.
        exclude: `files`: globs, relative to the folder, of files to leave out.
        sample_by: `text`: what one document is.
        field: the column that holds the text.
        subset, split: `hf`: which part of the data set.
        streaming: read in order without preparing or counting the whole first. Documents are
            then shuffled in blocks of `block_size`.
        block_size: number of documents that are shuffled together while streaming.
    """

    kind: Literal["files", "text", "jsonl", "parquet", "hf"]
    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    pattern: str = "**/*.txt"
    exclude: tuple[str, ...] = ()
    sample_by: Literal["document", "paragraph", "line"] = "document"
    field: str = "text"
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    block_size: int = Field(default=1000, ge=1)

    @model_validator(mode="after")
    def _only_its_own_keys(self) -> Self:
        # Compared by value, not by presence: the resolved recipe in a run folder writes every key.
        common = {"kind", "path", "weight"}
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.default}
        foreign = given - common - _KEYS_BY_KIND[self.kind]
        if foreign:
            raise ValueError(
                f"a source of kind {self.kind!r} takes no {', '.join(sorted(foreign))};"
                f" its keys are {', '.join(sorted(common | _KEYS_BY_KIND[self.kind]))}"
            )
        return self


class Recipe(Config):
    """A training stage. Lengths are in tokens, rates per optimizer step.

    Attributes:
        name, description: what `xoron train` takes, and what it does.
        mixture: sources of text by a name of your choice.
        eval_fraction: share of the documents held out, chosen by a hash of their content, so
            that copies of a document never fall on both sides. 0 evaluates nothing.
        max_unreadable: share of a source's documents that may be unreadable before the run stops.
        sequence_length: tokens per packed row.
        shuffle_rows: packed rows that are shuffled together, so that the rows of one long document
            do not follow each other; a checkpoint carries those still to come. 1 keeps the order.
        batch_size: rows per process and forward pass.
        gradient_accumulation_steps: forward passes per process and optimizer step.
        max_steps: optimizer steps.
        learning_rate: its peak, after the warm-up.
        warmup_steps, warmup_ratio: length of the linear warm-up, in steps or as a share of
            `max_steps`; at most one is given.
        min_lr_ratio: the cosine ends at this share of the peak.
        weight_decay: decoupled, on matrices only: not on biases, norms and embeddings.
        betas, epsilon: of AdamW.
        max_grad_norm: global norm to clip at, None for no clipping.
        precision: of the forward and backward pass; weights and optimizer stay fp32. `auto` is
            bf16 on a GPU that has it, else fp32.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of data order and weights' randomness.
        train: selectors (slot names or globs of parameter names) of what is trained; empty for
            whatever the composition does not freeze.
        freeze: selectors of what stays as it is, over `train`.
        loss_weights: weight per loss by name, 1 where not given.
        log_every: steps between records of the training loss.
        eval_every: steps between evaluations, None for one at the end.
        eval_batches: batches of `batch_size` held-out rows per source in those.
        final_eval_batches: the same for the evaluation at the end, None for everything held out.
        save_every: steps between checkpoints, None for one at the end.
        keep_checkpoints: how many are kept.
        tensorboard: whether to write TensorBoard event files.
    """

    name: str = Field(min_length=1)
    description: str = ""
    mixture: dict[str, SourceConfig] = Field(min_length=1)
    eval_fraction: float = Field(default=0.02, ge=0, le=0.5)
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    sequence_length: int = Field(default=1024, ge=2)
    shuffle_rows: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    loss_weights: dict[str, float] = Field(default_factory=dict)
    log_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    eval_batches: int = Field(default=8, ge=1)
    final_eval_batches: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.num_warmup_steps >= self.max_steps and self.max_steps > 1:
            raise ValueError(
                f"the warm-up of {self.num_warmup_steps} steps must end before max_steps"
                f" ({self.max_steps})"
            )
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if any(weight < 0 for weight in self.loss_weights.values()):
            raise ValueError(f"loss_weights must not be negative, got {self.loss_weights}")
        endless = [name for name, source in self.mixture.items() if source.streaming]
        if endless and self.eval_fraction and self.final_eval_batches is None:
            raise ValueError(
                f"set final_eval_batches: everything held out of a streamed source"
                f" ({', '.join(endless)}) has no known end"
            )
        return self

    @property
    def num_warmup_steps(self) -> int:
        """Length of the warm-up in optimizer steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_ratio or 0.0) * self.max_steps)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Finds a recipe by the name a plug-in gave it or by the path of a YAML file.

    Args:
        name: `text-tiny`, or `my/recipe.yaml`.
        overrides: `a.b=c` items over it.

    Raises:
        UsageError: for a name that no plug-in offers, with the closest one.
        ConfigError: for a wrong key or value, with file and line.
    """
    data, source = _read(name)
    return _absolute(Recipe.parse(apply_overrides(data, list(overrides)), source))


def recipes() -> dict[str, RecipeFile]:
    """Recipes of the installed plug-ins by name.

    Raises:
        UsageError: if two plug-ins offer one name.
    """
    found: dict[str, RecipeFile] = {}
    owners: dict[str, str] = {}
    for plugin, recipe in registry().extra("xoron_recipes"):
        if recipe.name in found:
            raise UsageError(
                f"recipe {recipe.name!r} is offered by the plug-ins {owners[recipe.name]!r} and"
                f" {plugin!r}; leave one out with --plugins -{plugin}"
            )
        found[recipe.name], owners[recipe.name] = recipe, plugin
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys under which two recipes' plain data differ, without `OBSERVING_KEYS` and
    `SIZE_KEYS` at the top level."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        if not prefix and key in OBSERVING_KEYS | SIZE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            keys += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key} ({before!r} -> {after!r})")
    return keys


def _read(name: str) -> tuple[dict[str, Any], Source]:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return read_yaml(name)
    known = recipes()
    if name not in known:
        raise UsageError(
            f"unknown recipe {name!r}.{did_you_mean(name, known)}"
            f" Recipes of the installed plug-ins: {', '.join(sorted(known)) or 'none'};"
            " or give the path of a YAML file."
        )
    package, _, path = known[name].resource.partition(":")
    text = resources.files(package).joinpath(path).read_text(encoding="utf-8")
    return parse_yaml(text, known[name].resource)


def _absolute(recipe: Recipe) -> Recipe:
    """Makes the paths of local sources absolute; `stdlib` and Hub names stay."""
    sources = {}
    for name, source in recipe.mixture.items():
        named = source.kind == "hf" or (source.kind == "files" and source.path == "stdlib")
        path = source.path if named else str(Path(source.path).expanduser().absolute())
        sources[name] = source.model_copy(update={"path": path})
    return recipe.model_copy(update={"mixture": sources})
