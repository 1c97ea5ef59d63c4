"""The evaluations that a recipe names: checked before a run, run during it.

An entry is the evaluation's own config with two keys more: `use`, its name, and `every`, whether it
also runs at each `eval_every` steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xoron_core.config import Source
from xoron_core.descriptors import resolve
from xoron_core.errors import ConfigError
from xoron_train.catalog import find

if TYPE_CHECKING:
    from xoron_train.evaluations.base import Evaluation, EvaluationConfig

_OWN = ("use", "every")


@dataclass(frozen=True)
class Entry:
    """One evaluation of a recipe.

    Attributes:
        name: what the recipe calls it.
        evaluation: built from its config.
        every: whether it runs at each `eval_every` steps, beside at the end.
    """

    name: str
    evaluation: Evaluation
    every: bool

    @property
    def config(self) -> EvaluationConfig:
        """Its source, split, number of samples and whether it is required."""
        config: EvaluationConfig = self.evaluation.config
        return config


def resolve_evaluations(
    entries: Mapping[str, Mapping[str, Any]],
    source: Source | None = None,
    *,
    key: str = "evaluations",
) -> dict[str, dict[str, Any]]:
    """Checks a recipe's evaluations and completes them with their defaults.

    Args:
        entries: as the recipe has them.
        source: where it was read, for errors.
        key: under which they stand there.

    Raises:
        ConfigError: for a wrong key or value, with file and line.
        UsageError: for a name that no plug-in offers.
    """
    return {
        name: {**{own: entry[own] for own in _OWN if own in entry}, **config.data()}
        for name, entry in entries.items()
        for config in [_config(name, entry, source, key)]
    }


def build_evaluations(
    entries: Mapping[str, Mapping[str, Any]], *, key: str = "evaluations"
) -> list[Entry]:
    """The evaluations of a recipe, or the gates of a suite.

    Args:
        entries: as it has them.
        key: under which they stand there, for errors.

    Raises:
        ConfigError, UsageError: as `resolve_evaluations`.
    """
    return [
        Entry(
            name,
            resolve(find("evaluation", entry["use"]).factory)(config),
            bool(entry.get("every", False)),
        )
        for name, entry in entries.items()
        for config in [_config(name, entry, None, key)]
    ]


def _config(
    name: str, entry: Mapping[str, Any], source: Source | None, key: str
) -> EvaluationConfig:
    where = f"{key}.{name}"
    here = (source or Source(where)).under(key, name)
    place = here.place(("use",))
    use, every = entry.get("use"), entry.get("every", False)
    if not isinstance(use, str) or not isinstance(every, bool):
        raise ConfigError(
            f"{place}: {where} needs use: NAME of an evaluation, and every: true or false if at"
            f" all; got use: {use!r}, every: {every!r}"
        )
    kind = resolve(find("evaluation", use, where=f"{place}: {where}.use").config)
    rest = {name: value for name, value in entry.items() if name not in _OWN}
    config: EvaluationConfig = kind.parse(rest, here)
    return config
