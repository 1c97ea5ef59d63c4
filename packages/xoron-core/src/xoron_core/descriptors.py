"""What a plug-in contributes, as data. Importing this module costs nothing: no torch, no pydantic.

A hook returns these descriptors; a `module:attribute` reference in one of them is imported only
when the thing is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "tokenizer",
    "backbone",
    "encoder",
    "projector",
    "codec",
    "autoencoder",
    "generator",
    "fusion",
    "loss",
]
KINDS: tuple[str, ...] = get_args(Kind)


def resolve(reference: str) -> Any:
    """Imports a `package.module:attribute` reference.

    Raises:
        ImportError: if the module is missing.
        AttributeError: if the module has no such attribute.
    """
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Component:
    """A named, typed, lazily imported part.

    Attributes:
        kind: one of `KINDS`; it decides the interface (`xoron_core.components`).
        name: unique within the kind, e.g. `xoron-moe`.
        modality: the modality it belongs to; `text` for backbones and tokenizers.
        factory: `pkg.module:Class`, called as `Class(config, context)`.
        config: `pkg.module:ConfigClass`, a `xoron_core.config.Config`. Its module must not
            import torch, so that plans and schemas stay light.
        summary: one line for `xoron plugins show`.
        requires: extra distributions it needs, as pip requirement strings.
        token_groups: groups of special tokens that composing it selects.
    """

    kind: Kind
    name: str
    modality: str
    factory: str
    config: str
    summary: str
    requires: tuple[str, ...] = ()
    token_groups: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """`kind/name`, as the command line writes it."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Modality:
    """A kind of media and the markers of the spans it may form in a sequence.

    Attributes:
        name: `image`, `audio`, or a third party's own.
        content_types: the `type` values of message content that carry it.
        begin, end: strings of the special tokens around an *input* span.
        gen_begin, gen_end: the same around an *output* span.
        placeholder: the special token whose id stands at positions that are not ids
            themselves: encoder features and generator queries.
        load: `pkg.module:function`, from a path, bytes or array to the object that the
            components' processors take.
        sample: `pkg.module:function`, called as `sample(seed, size)`: a made-up medium that `load`
            takes, without files. Sizes 1, 2, 3 are ever longer where media have lengths. Checks
            and diagnoses feed components with it; empty leaves them the dummy batches.
    """

    name: str
    content_types: tuple[str, ...]
    begin: str
    end: str
    gen_begin: str
    gen_end: str
    placeholder: str
    load: str
    sample: str = ""


@dataclass(frozen=True)
class TokenGroup:
    """A named, selectable group of special tokens.

    Attributes:
        name: `distribution/group`, e.g. `xoron-core/control`.
        tokens: token name to string, in their canonical order.
        hidden: names whose content is internal and stripped from shown text.
    """

    name: str
    tokens: Mapping[str, str]
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Preset:
    """A named piece of configuration shipped as a package resource.

    With `component` (`kind/name`) it configures that component; without, it is a fragment of a
    composition, merged with the fragments that other plug-ins ship under the same name.

    Attributes:
        name: `tiny`, `small`, `xoron-dev`, ...
        resource: `package:path/inside/it.yaml`.
        component: `kind/name`, or None for a composition fragment.
    """

    name: str
    resource: str
    component: str | None = None


@dataclass(frozen=True)
class Command:
    """A sub-command of `xoron`.

    Attributes:
        name: the word after `xoron`, or the name of a group that takes further sub-commands and a
            word after that: `tokens build` (see `xoron_core.cli.groups`).
        target: `pkg.module:function`, a typer command function; imported when it is called or
            its help is shown.
        help: one line for `xoron --help`.
    """

    name: str
    target: str
    help: str


@dataclass(frozen=True)
class Origin:
    """Where a plug-in comes from."""

    distribution: str
    version: str
    location: str = ""


@dataclass(frozen=True)
class Contribution:
    """All that one plug-in contributes, collected from its hooks."""

    components: tuple[Component, ...] = ()
    modalities: tuple[Modality, ...] = ()
    presets: tuple[Preset, ...] = ()
    token_groups: tuple[TokenGroup, ...] = ()
    commands: tuple[Command, ...] = ()
    extras: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
