"""A suite: gates by name, and the conversations and texts that they are asked on. Light: no torch.

    name: tokens
    mixture:
      media: {kind: dataset, path: token-digits}
    gates:
      media-ablation: {use: seeing, source: media, shuffled: {delta: 0.10, wins: 0.80}}

`mixture` is written as in a recipe; weights mean nothing here. A source of text gives its documents
as conversations of one message. A suite ships with the package or is a YAML file.

Footgun: local files of conversations are judged whole: name files that were not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from xoron_core.config import Config, Source, apply_overrides, parse_yaml, read_yaml
from xoron_core.descriptors import resolve
from xoron_core.errors import ConfigError, DataError, UsageError, did_you_mean
from xoron_train.catalog import find
from xoron_train.conversation import Conversation
from xoron_train.data.config import SourceConfig
from xoron_train.evaluation_entries import Entry, build_evaluations, resolve_evaluations
from xoron_train.recipe import require_paths

if TYPE_CHECKING:
    from xoron_core.config import Path_

# Below so many samples a share of 80 % is known to no better than some 5 points.
MINIMUM = 256
# Conversations that are looked through for each that is asked for: a data set that is made on the
# spot may go on without end and hold none that suits.
_LOOKED_THROUGH = 16
_FOLDER = "presets/gates"
_NO_KEYS = ("every", "required")


class Suite(Config):
    """What a model is asked.

    Attributes:
        name: of the suite and of its report.
        description: what passing it means.
        mixture: sources of conversations and of text, by a name of your choice.
        gates: by a name of your choice, evaluations with thresholds: `{use: NAME, source: ...,
            samples: 256, ...}` as the installed plug-ins offer them. All must pass.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    description: str = ""
    mixture: dict[Annotated[str, Field(min_length=1)], SourceConfig] = Field(min_length=1)
    gates: dict[str, dict[str, Any]] = Field(min_length=1)

    def entries(self) -> list[Entry]:
        """Its gates, built."""
        return build_evaluations(self.gates, key="gates")

    def samples(self, gate: Entry) -> list[Conversation]:
        """The first conversations of a gate's source that suit it.

        Raises:
            DataError: if there are fewer than the gate asks for, or one is unreadable.
        """
        name, wanted = gate.config.source, gate.config.samples
        found: list[Conversation] = []
        looked = 0
        for sample in islice(
            self._conversations(name, gate.config.split), _LOOKED_THROUGH * wanted
        ):
            looked += 1
            if gate.evaluation.suits(sample):
                found.append(sample)
            if len(found) == wanted:
                return found
        split = f" ({gate.config.split})" if self.mixture[name].kind == "dataset" else ""
        raise DataError(
            f"gates.{gate.name}: {len(found)} of {looked} conversations of mixture.{name}{split}"
            f" suit {type(gate.evaluation).__name__.lower()}, expected {wanted}; give others"
            f"{', maybe by another split' if split else ''}, or set gates.{gate.name}.samples"
        )

    def _conversations(self, name: str, split: str) -> Iterator[Conversation]:
        from xoron_train.data.conversations import ConversationTable, open_dataset
        from xoron_train.data.sources import UnreadableError

        config, where = self.mixture[name], f"mixture.{name}"
        if not config.holds_conversations:
            yield from _texts(name, config)
            return
        if config.kind == "dataset":
            opened: Any = open_dataset(where, config, split)
        else:
            opened = ConversationTable(where, config.path, column=config.column)
        for index in range(len(opened)):
            try:
                yield opened[index]
            except UnreadableError as error:
                raise DataError(f"{where}: {error}; mend it or take it out") from None


def load_suite(
    name: str, overrides: Iterable[str] = (), *, base: str | None = None, ready: bool = True
) -> Suite:
    """Finds a suite that ships with the package, or a YAML file by its path.

    Args:
        name: `tokens`, or `my/suite.yaml`.
        overrides: `a.b=c` items over it; `gates.NAME=null` leaves a gate out.
        base: for the gates that compare with another model and name none, that model's folder.
        ready: whether it is to be run, so that all data must be named.

    Raises:
        UsageError: for an unknown name, or a base that no gate compares with.
        ConfigError: for a wrong key or value, with file and line.
    """
    data, source = _read(name)
    data = apply_overrides(data, list(overrides))
    if isinstance(gates := data.get("gates"), dict):
        data["gates"] = {gate: entry for gate, entry in gates.items() if entry is not None}
    if ready:
        require_paths(data.get("mixture"), source)
    elif isinstance(mixture := data.get("mixture"), dict):
        data["mixture"] = {name: {"kind": "dataset", "path": "-"} for name in mixture}
    suite = Suite.parse(data, source)
    _check_gates(suite, source)
    gates = resolve_evaluations(suite.gates, source, key="gates")
    if base is not None:
        gates = _with_base(gates, base)
    return suite.model_copy(update={"gates": gates})


def _read(name: str) -> tuple[dict[str, Any], Source]:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return read_yaml(name)
    folder = resources.files("xoron_train").joinpath(_FOLDER)
    known = {Path(file.name).stem: file for file in folder.iterdir()}
    if name not in known:
        raise UsageError(
            f"unknown suite {name!r}.{did_you_mean(name, known)} There are:"
            f" {', '.join(sorted(known))}; or give the path of a YAML file."
        )
    text = known[name].read_text(encoding="utf-8")
    return parse_yaml(text, f"xoron_train:{_FOLDER}/{name}.yaml")


def _check_gates(suite: Suite, source: Source) -> None:
    for name, entry in suite.gates.items():
        place: Path_ = ("gates", name)
        if wrong := [key for key in _NO_KEYS if key in entry]:
            raise ConfigError(
                f"{source.place((*place, wrong[0]))}: gates.{name}.{wrong[0]}: every gate is asked"
                " once and required; leave the key out"
            )
        if (of := entry.get("source")) not in suite.mixture:
            raise ConfigError(
                f"{source.place((*place, 'source'))}: gates.{name}.source: nothing stands in the"
                f" mixture under {of!r}.{did_you_mean(str(of), suite.mixture)} There are:"
                f" {', '.join(suite.mixture)}"
            )
        if suite.mixture[of].kind == "shards":
            raise ConfigError(
                f"{source.place((*place, 'source'))}: gates.{name}.source: mixture.{of} holds ids,"
                " and a gate is asked on conversations; name what the shards were made of"
            )
        if "split" in entry and suite.mixture[of].kind != "dataset":
            raise ConfigError(
                f"{source.place((*place, 'split'))}: gates.{name}.split: mixture.{of} is no data"
                " set of a plug-in and is judged whole; leave the key out"
            )


def _with_base(gates: dict[str, dict[str, Any]], base: str) -> dict[str, dict[str, Any]]:
    chosen = [
        name
        for name, entry in gates.items()
        if "base" in resolve(find("evaluation", entry["use"]).config).model_fields
    ]
    if not chosen:
        raise UsageError(
            f"--base {base}: no gate of this suite compares with another model; leave it out"
        )
    filled = {name: gates[name] | {"base": gates[name]["base"] or base} for name in chosen}
    return gates | filled


def _texts(name: str, config: SourceConfig) -> Iterator[Conversation]:
    """The documents of a source of text, each as what a user says."""
    from xoron_train.data.sources import IndexedSource, UnreadableError, open_source

    source = open_source(name, config)
    if isinstance(source, IndexedSource):
        documents = source.walk(range(len(source)))
    else:
        documents = source.read_from(0)
    for document in documents:
        if isinstance(document, UnreadableError):
            raise DataError(f"mixture.{name}: {document}; mend it or take it out")
        yield Conversation(document.name, [{"role": "user", "content": document.text}])
