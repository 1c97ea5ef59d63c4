"""Typed configuration: frozen pydantic models, unknown keys refused, errors with file and line.

Everything that configures xoron derives from `Config`. Data comes from YAML or JSON, so
validation follows JSON's types, strictly: a list may fill a tuple, the string "3" never fills an
integer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from xoron_core.errors import ConfigError, did_you_mean

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where configuration data was read, so that an error can name the line.

    Attributes:
        name: file name or another description shown in errors.
        lines: path of keys to 1-based line number.
    """

    name: str
    lines: Mapping[Path_, int] = field(default_factory=dict)

    def place(self, path: Path_) -> str:
        """Returns `file:line` of the closest known ancestor of `path`, or just the name."""
        for length in range(len(path), 0, -1):
            if (line := self.lines.get(path[:length])) is not None:
                return f"{self.name}:{line}"
        return self.name

    def under(self, *prefix: str) -> Source:
        """Returns the source of a nested mapping, with paths relative to it."""
        n = len(prefix)
        return Source(
            self.name,
            {path[n:]: line for path, line in self.lines.items() if path[:n] == prefix},
        )


class Config(BaseModel):
    """Base of every configuration: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: Source | None = None) -> Self:
        """Validates plain data.

        Raises:
            ConfigError: naming every wrong key with its place, what was expected and what came.
        """
        source = source or Source(cls.__name__)
        try:
            return cls.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, source)) from None
        except TypeError as error:
            raise ConfigError(f"{source.name}: {cls.__name__} takes plain data: {error}") from None

    def data(self) -> dict[str, Any]:
        """Returns plain JSON data that `parse` reads back to an equal object."""
        return self.model_dump(mode="json", by_alias=True)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Source]:
    """Reads a YAML mapping and the line of each of its keys.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path}: cannot be read ({reason}); expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason})") from None
    return parse_yaml(text, str(path))


def read_json(file: Path | Traversable, *, what: str, expected: str) -> dict[str, Any]:
    """Reads a JSON mapping, such as a checkpoint's config.json.

    Args:
        file: of a folder, a package or the Hub's cache.
        what: reads it; the error begins with that.
        expected: what should have been named, the error's end.

    Raises:
        ConfigError: if the file is missing, is not JSON, or holds no mapping.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what}: {file} cannot be read ({reason}); {expected}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{what}: {file} holds no mapping but a {type(data).__name__}; {expected}"
        )
    return data


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """Like `read_yaml`, from text; `name` stands for the file in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{place}: not valid YAML: {problem}") from None
    if node is None:
        return {}, Source(name)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}:1: expected a mapping of keys, got {type(data).__name__}")
    lines: dict[Path_, int] = {}
    _collect_lines(node, (), lines, name)
    return data, Source(name, lines)


def _collect_lines(node: yaml.Node, path: Path_, lines: dict[Path_, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                raise ConfigError(
                    f"{name}:{line}: key {key.value!r} stands twice (first on line {lines[here]});"
                    " keep one"
                )
            lines[here] = line
            _collect_lines(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _collect_lines(value, (*path, index), lines, name)


def apply_overrides(data: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies `a.b=c` overrides to nested plain data; values are read as YAML.

    Raises:
        ConfigError: if an override is not of the form `key=value` or goes through a non-mapping.
    """
    result: dict[str, Any] = json.loads(json.dumps(data))
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {override!r}: expected key=value, e.g. --set backbone.depth=4"
            )
        try:
            value = yaml.safe_load(raw) if raw else ""
        except yaml.YAMLError:
            raise ConfigError(f"--set {override!r}: {raw!r} is not a YAML value") from None
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            nested = target.setdefault(parent, {})
            if not isinstance(nested, dict):
                raise ConfigError(
                    f"--set {override!r}: {parent!r} holds {nested!r}, which has no keys inside"
                )
            target = nested
        target[last] = value
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; values of `over` win, lists are replaced whole."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def _explain(error: ValidationError, model: type[BaseModel], source: Source) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path: Path_ = tuple(item["loc"])
        where = ".".join(str(part) for part in path) or model.__name__
        if item["type"] == "extra_forbidden":
            options = _fields_at(model, path[:-1])
            hint = did_you_mean(str(path[-1]), options)
            if not hint:
                hint = f" Known keys: {', '.join(sorted(options))}."
            text = f"unknown key {where!r}.{hint}"
        elif item["type"] == "missing":
            text = f"{where!r} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            text = f"{where!r}: {message[:1].lower()}{message[1:]}, got {_short(item['input'])}"
        lines.append(f"{source.place(path)}: {text}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], path: Path_) -> list[str]:
    """Names of the fields of the model that sits at `path` inside `model`."""
    current: Any = model
    for part in path:
        candidate = getattr(current, "model_fields", {}).get(part)
        if candidate is None:  # a key or an index of the container that `current` stands in
            continue
        annotation = candidate.annotation
        current = next(
            (
                arg
                for arg in (annotation, *getattr(annotation, "__args__", ()))
                if isinstance(arg, type) and issubclass(arg, BaseModel)
            ),
            None,
        )
    return list(getattr(current, "model_fields", {}))


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
