"""Configs: plain data that survives a round trip, with a schema; and references that resolve."""

from __future__ import annotations

import inspect
import json
from typing import Any

from xoron_core import components
from xoron_core.config import Config
from xoron_core.descriptors import KINDS, resolve
from xoron_core.errors import ConfigError, XoronError
from xoron_core.testing.catalogue import check
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject


@check(
    "references", KINDS, since=1, summary="factory and config name classes of its kind", needs=()
)
def references(subject: Subject) -> None:
    component = subject.component
    interface = getattr(components, component.kind.capitalize())
    for field, wanted in (("factory", interface), ("config", Config)):
        reference = getattr(component, field)
        try:
            found = resolve(reference)
        except (ImportError, AttributeError, ValueError, OSError) as error:
            raise CheckFailed(
                f"xoron_components: {component.key}: {field} is {reference!r}, which cannot be"
                f" imported ({type(error).__name__}: {error}); write 'package.module:Class'"
            ) from error
        if not (inspect.isclass(found) and issubclass(found, wanted)):
            raise CheckFailed(
                f"xoron_components: {component.key}: {field} names {reference}, which is no class"
                f" derived from {wanted.__module__}.{wanted.__name__}"
            )
    if missing := sorted(getattr(subject.cls, "__abstractmethods__", ())):
        raise CheckFailed(
            f"{component.factory} does not implement {', '.join(missing)}; a {component.kind} must"
        )


@check(
    "config-default",
    KINDS,
    since=1,
    summary="the preset `tiny` or the default config is valid",
    needs=("references",),
)
def config_default(subject: Subject) -> None:
    try:
        _ = subject.config
    except XoronError as error:
        raise CheckFailed(
            f"{subject.component.config} has neither a valid default nor a valid preset `tiny`:"
            f" {error}. Return Preset('tiny', 'package:file.yaml', component={subject.key!r}) from"
            " xoron_presets"
        ) from error


@check(
    "config-round-trip",
    KINDS,
    since=1,
    summary="`parse(config.data())` is equal to the config, through JSON",
    needs=("config-default",),
)
def config_round_trip(subject: Subject) -> None:
    config = subject.config
    where = subject.component.config
    data = config.data()
    try:
        again = type(config).parse(json.loads(json.dumps(data)))
    except (XoronError, TypeError, ValueError) as error:
        raise CheckFailed(f"{where}.parse refuses what data() gives: {error}") from error
    if again != config or again.data() != data:
        changed = [key for key, value in data.items() if again.data().get(key) != value]
        raise CheckFailed(
            f"{where}: parse(config.data()) is not the same config; a round trip changes"
            f" {', '.join(changed) or 'it'}. Validators must leave valid values as they are"
        )


@check(
    "config-schema",
    KINDS,
    since=1,
    summary="the config prints a JSON schema and refuses unknown keys",
    needs=("config-default",),
)
def config_schema(subject: Subject) -> None:
    cls = type(subject.config)
    schema: dict[str, Any] = cls.model_json_schema()
    json.dumps(schema)
    if missing := set(cls.model_fields) - set(schema.get("properties", {})) - _aliases(cls):
        raise CheckFailed(f"the schema of {cls.__name__} lacks {', '.join(sorted(missing))}")
    try:
        cls.parse({**subject.config.data(), "no_such_key_xyz": 1})
    except ConfigError:
        return
    raise CheckFailed(
        f"{subject.component.config} takes an unknown key; derive it from xoron_core.config.Config"
        " and leave `extra` at 'forbid', so that a typing error is found"
    )


def _aliases(cls: type[Config]) -> set[str]:
    return {name for name, field in cls.model_fields.items() if field.alias}
