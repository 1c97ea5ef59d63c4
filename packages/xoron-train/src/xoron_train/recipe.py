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
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from xoron_core.config import Config, Source, apply_overrides, parse_yaml, read_yaml
from xoron_core.errors import ConfigError, did_you_mean
from xoron_train.catalog import find, offered
from xoron_train.data.config import SourceConfig
from xoron_train.evaluation_entries import resolve_evaluations
from xoron_train.hookspecs import RecipeFile

# Keys a run may change between its start and a resume: they decide what is shown and kept and how
# fast it goes, not what is learned. The two sizes may change too as long as their product with the
# number of processes, the rows of one optimizer step, stays.
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
        "evaluations",
        "num_workers",
    }
)
SIZE_KEYS = frozenset({"batch_size", "gradient_accumulation_steps"})
GOLDEN_FILES = (".jsonl", ".parquet")


class LoraRecipe(Config):
    """A low-rank adapter on the backbone, which itself stays as it is.

    Attributes:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r, with `use_rslora` by alpha / sqrt(r).
        dropout: on the adapter's input.
        targets: selectors of linear layers of the backbone; empty for all of its attention and
            feed-forward layers.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023).
        use_dora: magnitude and direction apart (Liu et al. 2024).
        merge: whether `RUN/model` holds the merged weights; else the unchanged base. Merged weights
            are of the base's dtype, which rounds them where it is bf16; `RUN/adapter` is exact.
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    merge: bool = True


class MuonRecipe(Config):
    """Muon: momentum, made orthogonal (Jordan et al. 2024).

    Attributes:
        learning_rate: its peak; a matrix with more rows than columns is scaled by the root of that
            ratio. The schedule and the weight decay are the recipe's.
        momentum: Nesterov's.
    """

    learning_rate: float = Field(default=0.02, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)


class RowsRecipe(Config):
    """New vocabulary rows (special tokens and codec ids), trained apart from their matrices.

    Attributes:
        start: `mean` draws them around the mean of the old rows, `text` those that have a
            description around the mean of its tokens' rows and the others as `mean`; `keep` takes
            them as the model has them, for a stage that goes on.
        descriptions: text by the name of a special token or of a codec's range.
        noise: of the draw, in standard deviations of the old rows.
    """

    start: Literal["mean", "text", "keep"] = "mean"
    descriptions: dict[str, str] = Field(default_factory=dict)
    noise: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _described(self) -> Self:
        if (self.start == "text") != bool(self.descriptions):
            raise ValueError(
                f"start: text goes with descriptions, and they with it; got start: {self.start}"
                f" and {len(self.descriptions)} descriptions"
            )
        return self


class Recipe(Config):
    """A training stage. Lengths are in tokens, rates per optimizer step.

    Attributes:
        name, description: what `xoron train` takes, and what it does.
        mixture: sources of text and of conversations by a name of your choice.
        eval_fraction: share of the documents held out, chosen by a hash of their content, so
            that copies of a document never fall on both sides; of conversations with media, by a
            hash of the media. 0 evaluates nothing. A `dataset` brings its own split.
        golden: what nothing may be trained on: files of conversations (paths or globs), or
            `SOURCE:SPLIT` of a `dataset` in the mixture. A conversation that holds one of their
            media is kept out of training.
        max_unreadable: share of a source's documents that may be unreadable before the run stops.
        sequence_length: tokens per packed row, and the most positions of a conversation. A longer
            one is left out whole, as unreadable: cutting it could cut a medium in two. Means
            nothing where media alone are trained on.
        budgets: how many positions media take, by slot of a projector that can do with fewer: a
            number, or `random` for one of its `budgets`, drawn anew for every micro-batch.
        shuffle_rows: packed rows that are shuffled together, so that the rows of one long document
            do not follow each other; a checkpoint carries those still to come. 1 keeps the order.
        length_group_steps: steps whose rows are drawn together and grouped by length, so that less
            of a batch is padding; 1 leaves the order, in which a step's rows are only sorted.
        batch_size: rows per process and forward pass: packed text, or conversations with all their
            media.
        gradient_accumulation_steps: forward passes per process and optimizer step.
        max_steps: optimizer steps.
        learning_rate: its peak, after the warm-up.
        warmup_steps, warmup_ratio: length of the linear warm-up, in steps or as a share of
            `max_steps`; at most one is given.
        min_lr_ratio: the cosine ends at this share of the peak.
        weight_decay: decoupled, on matrices only: not on biases, norms and embeddings.
        betas, epsilon: of AdamW.
        muon: trains the matrices inside the model with Muon; `learning_rate` is then that of the
            embeddings, heads, norms, biases and convolutions.
        max_grad_norm: global norm to clip at, None for no clipping.
        precision: of the forward and backward pass; weights and optimizer stay fp32. `auto` is
            bf16 on a GPU that has it, else fp32.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of data order and weights' randomness.
        train: selectors (slot names or globs of parameter names) of what is trained; empty for
            whatever the composition does not freeze. Codecs and autoencoders learn from media
            alone, everything else from sequences, and a run does one of the two: a recipe that
            names codecs or autoencoders (and losses that judge them) trains them on all media of
            their modality; one that names nothing leaves them as they are if there is a backbone.
        freeze: selectors of what stays as it is, over `train`.
        lora: an adapter to train; then `train` names what is trained whole beside it.
        rows: trains new vocabulary rows apart, likewise. Old rows stay as they are, also where
            `train` names the backbone; `RUN/rows` holds the new ones.
        legal: whether a codec's id that is to be learned competes with the ids of its codebook
            alone, in training and in the held-out loss. It then teaches nothing about where a
            medium ends; use it where the number of ids is fixed.
        save_delta: whether `RUN/connector` gets the trained slots as a delta; with `lora` they
            stand in `RUN/adapter` anyway.
        loss_weights: weight per loss by name, 1 where not given.
        log_every: steps between records of the training loss.
        eval_every: steps between evaluations, None for one at the end.
        eval_batches: batches of `batch_size` held-out rows per source in those.
        final_eval_batches: the same for the evaluation at the end, None for everything held out.
        num_workers: processes, for each that trains, that read conversations and their media ahead;
            0 reads between the steps. What is trained does not depend on it.
        save_every: steps between checkpoints, None for one at the end.
        keep_checkpoints: how many are kept.
        tensorboard: whether to write TensorBoard event files.
        requires: suites that the model must have passed, by name or path: its folder must carry
            their reports, made of these very weights by `xoron gate`.
        evaluations: by a name of your choice, what else judges the model at the end, or with
            `every: true` at each evaluation: `{use: NAME, source: ..., split: ..., ...}` as the
            installed plug-ins offer them.
    """

    name: str = Field(min_length=1)
    description: str = ""
    mixture: dict[Annotated[str, Field(min_length=1)], SourceConfig] = Field(min_length=1)
    eval_fraction: float = Field(default=0.02, ge=0, le=0.5)
    golden: tuple[str, ...] = ()
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    sequence_length: int = Field(default=1024, ge=2)
    budgets: dict[str, PositiveInt | Literal["random"]] = Field(default_factory=dict)
    shuffle_rows: int = Field(default=256, ge=1)
    length_group_steps: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    muon: MuonRecipe | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    lora: LoraRecipe | None = None
    rows: RowsRecipe | None = None
    legal: bool = False
    save_delta: bool = False
    loss_weights: dict[str, float] = Field(default_factory=dict)
    log_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    eval_batches: int = Field(default=8, ge=1)
    final_eval_batches: int | None = Field(default=None, ge=1)
    num_workers: int = Field(default=0, ge=0)
    save_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = True
    requires: tuple[str, ...] = ()
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)

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
        self._check_conversations()
        return self

    def _check_conversations(self) -> None:
        talks = [name for name, source in self.mixture.items() if source.holds_conversations]
        for key in ("golden", "budgets"):
            if getattr(self, key) and not talks:
                raise ValueError(
                    f"{key} is about conversations, and the mixture holds none (a source of kind"
                    " conversations or dataset)"
                )
        if self.length_group_steps > 1 and not talks:
            raise ValueError(
                "length_group_steps is about conversations: packed rows of text have one length"
            )
        brought = [name for name in talks if self.mixture[name].kind == "dataset"]
        for name in self.golden:
            if not name.endswith(GOLDEN_FILES) and name.rpartition(":")[0] not in brought:
                raise ValueError(
                    f"golden: {name!r} is neither a file ({' or '.join(GOLDEN_FILES)}) nor"
                    f" SOURCE:SPLIT of a source of kind dataset ({', '.join(brought) or 'none'})."
                    f"{did_you_mean(name.rpartition(':')[0], brought)}"
                )
        for name, entry in self.evaluations.items():
            source = entry.get("source")
            if source is not None and source not in talks:
                raise ValueError(
                    f"evaluations.{name}.source: no conversations stand in the mixture under"
                    f" {source!r}.{did_you_mean(str(source), talks)} There are:"
                    f" {', '.join(talks) or 'none'}"
                )

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
    data = apply_overrides(data, list(overrides))
    require_paths(data.get("mixture"), source)
    recipe = Recipe.parse(data, source)
    evaluations = resolve_evaluations(recipe.evaluations, source)
    return _absolute(recipe.model_copy(update={"evaluations": evaluations}))


def recipes() -> dict[str, RecipeFile]:
    """Recipes of the installed plug-ins by name.

    Raises:
        UsageError: if two plug-ins offer one name.
    """
    return offered("recipe")


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
    known = find("recipe", name, hint="; or give the path of a YAML file.")
    package, _, path = known.resource.partition(":")
    text = resources.files(package).joinpath(path).read_text(encoding="utf-8")
    return parse_yaml(text, known.resource)


def require_paths(mixture: Any, source: Source) -> None:
    """Asks for the data that a shipped recipe cannot name; other mistakes are `parse`'s to say."""
    for name, entry in mixture.items() if isinstance(mixture, Mapping) else ():
        if isinstance(entry, Mapping) and not entry.get("path"):
            raise ConfigError(
                f"{source.place(('mixture', name))}: mixture.{name}.path is not set; say where the"
                f" data of this source lies: --set mixture.{name}.path=PATH"
            )


def _absolute(recipe: Recipe) -> Recipe:
    """Makes the paths of local files absolute; `stdlib` and names stay."""
    sources = {}
    for name, source in recipe.mixture.items():
        stdlib = source.kind == "files" and source.path == "stdlib"
        named = stdlib or source.kind in ("hf", "dataset")
        path = source.path if named else _absolute_path(source.path)
        sources[name] = source.model_copy(update={"path": path})
    golden = tuple(
        _absolute_path(name) if name.endswith(GOLDEN_FILES) else name for name in recipe.golden
    )
    return recipe.model_copy(update={"mixture": sources, "golden": golden})


def _absolute_path(path: str) -> str:
    return str(Path(path).expanduser().absolute())
