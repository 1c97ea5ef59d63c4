"""The reference pages: hooks, component kinds and configs, read from the code.

Only what is declared is shown: signatures and docstrings of hooks and interfaces, and the fields of
pydantic configs with their types, defaults and bounds. Components are those of the installed
plug-ins of this repository.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from docstrings import entries, section, table, text
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from xoron_core import components, descriptors, hookspecs
from xoron_core.descriptors import KINDS, resolve
from xoron_core.plugins import registry

_ORIGIN = "Written by `hatch run docs` from the code.\n"
# Whose configs are described: a plug-in that happens to be installed beside them is not.
_OURS = ("core", "llm", "vision", "video", "audio", "gen", "train", "synth", "export")
# Configs that no component names.
_CONFIGS = (
    "xoron_core.composer.composition:TokensConfig",
    "xoron_core.composer.composition:Route",
    "xoron_core.sampling:Sampling",
    "xoron_train.recipe:Recipe",
)
# What the interfaces exchange.
_EXCHANGED = ("Context", "Features", "Codes", "LossTerm", "BackboneOutput", "MediaProcessor")
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}


def hooks() -> str:
    """The page of the hooks and of the descriptors they return."""
    plugin = "`from xoron_core.hookspecs import hookimpl` marks an implementation."
    page = f"# Hooks\n\n{_ORIGIN}\nThe plug-in API has version {hookspecs.API_VERSION}. {plugin}\n"
    specified = [(hookspecs.__name__, hookspecs)]
    for found in registry().plugins:
        if found.name in _OURS and found.state == "available":
            bring = getattr(__import__(found.module, fromlist=["_"]), "xoron_hookspecs", list)
            specified += [(module.__name__, module) for module in bring()]
    shown: list[type] = []
    for name, module in specified:
        page += f"\n## {name}\n"
        for hook, function in _functions(module):
            page += f"\n### {hook}\n\n{_signature(hook, function)}\n{text(function)}\n"
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]
        shown += [c for c in own if dataclasses.is_dataclass(c)]
    page += "\n## Descriptors\n"
    returned = (descriptors.Component, descriptors.Modality, descriptors.TokenGroup)
    for cls in (*returned, descriptors.Preset, descriptors.Command, *shown):
        page += f"\n### {cls.__name__}\n\n{text(cls)}\n\n{_fields(cls)}"
    return page


def kinds() -> str:
    """The page of the component interfaces."""
    page = f"# Component kinds\n\n{_ORIGIN}\n{text(components)}\n"
    page += f"\n## Every neural component\n\n{_interface(components.Part)}"
    for kind in KINDS:
        page += f"\n## {kind}\n\n{_interface(getattr(components, kind.capitalize()))}"
    page += "\n## What they exchange\n"
    for name in _EXCHANGED:
        cls = getattr(components, name)
        page += f"\n### {name}\n\n{text(cls)}\n"
        said = entries(cls, "Attributes")
        if said:
            page += "\n" + table(("field", "meaning"), ((f"`{k}`", v) for k, v in said.items()))
        if getattr(cls, "_is_protocol", False):
            page += "".join(f"\n{_method(n, f)}" for n, f in _functions(cls))
    return page


def configs() -> str:
    """The page of every config: components', compositions', sampling, recipes."""
    page = f"# Configs\n\n{_ORIGIN}\nUnknown keys are refused. `xoron schema KIND/NAME` prints"
    page += " the same as a JSON schema.\n"
    shown: set[type] = set()
    ours = {p.name: p for p in registry().available if p.name in _OURS}
    found = [c for name in _OURS if name in ours for c in ours[name].contribution.components]
    for component in sorted(found, key=lambda c: (KINDS.index(c.kind), c.name)):
        page += f"\n## {component.key}\n\n{component.summary}\n"
        presets = ", ".join(f"`{n}`" for n in registry().preset_names(component.key))
        page += f"\nPresets: {presets}.\n" if presets else ""
        page += "".join(_config(cls) for cls in _nested(resolve(component.config), shown))
    page += "\n## Beside the components\n"
    for reference in _CONFIGS:
        page += "".join(_config(cls) for cls in _nested(resolve(reference), shown))
    return page


def _functions(owner: Any) -> Iterator[tuple[str, Any]]:
    """Public functions that a module or class defines itself, unwrapped."""
    module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    for name, value in vars(owner).items():
        function = _function(value)
        own = inspect.isfunction(function) and function.__module__ == module
        if own and not name.startswith("_"):
            yield name, value


def _function(value: Any) -> Any:
    """What a class method or a property wraps, or the value itself."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def _signature(name: str, value: Any) -> str:
    """A code block with the signature, one parameter a line where it would be long."""
    head = f"@{type(value).__name__}\n" if isinstance(value, property | classmethod) else ""
    signature = str(inspect.signature(_function(value))).replace("'", "")
    if len(signature) + len(name) > 84:
        inside, _, result = signature[1:].rpartition(")")
        parameters = re.sub(r", (?=\*?\*?\w+(?:[:,]|$))", ",\n    ", inside)
        signature = f"(\n    {parameters},\n){result}"
    return f"```python\n{head}def {name}{signature}\n```\n"


def _method(name: str, value: Any) -> str:
    plain = _function(value)
    said = _signature(name, value)
    said += f"\n{text(plain)}\n"
    arguments = entries(plain, "Args")
    if arguments:
        said += "\n" + table(("argument", "meaning"), ((f"`{k}`", v) for k, v in arguments.items()))
    for part in ("Returns", "Raises"):
        if section(plain, part):
            said += f"\n{part}: {section(plain, part)}\n"
    return said


def _interface(cls: type) -> str:
    """What a component of a kind has, must implement and may override."""
    said = f"`xoron_core.components.{cls.__name__}`. {text(cls)}\n"
    attributes = entries(cls, "Attributes")
    if attributes:
        rows = ((f"`{name}`", meaning) for name, meaning in attributes.items())
        said += "\n" + table(("attribute", "meaning"), rows)
    methods = list(_functions(cls))
    for title, needed in (("Implements", True), ("May override", False)):
        # Asked of the method: a class of torch modules is no ABC and keeps no list of them.
        group = [m for m in methods if getattr(m[1], "__isabstractmethod__", False) is needed]
        if group:
            said += f"\n### {title}\n" + "".join(f"\n{_method(n, f)}" for n, f in group)
    return said


def _fields(cls: Any) -> str:
    """A dataclass's fields."""
    said = entries(cls, "Attributes")
    rows = []
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        default = "needed" if needed else f"`{_default(field)!r}`"
        rows.append((f"`{field.name}`", f"`{field.type}`", default, said.get(field.name, "")))
    return table(("field", "type", "default", "meaning"), rows)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _nested(cls: type[BaseModel], shown: set[type]) -> Iterator[type[BaseModel]]:
    """A config and the configs in its fields, each once."""
    if cls in shown:
        return
    shown.add(cls)
    yield cls
    for field in cls.model_fields.values():
        for inner in _classes(field.annotation):
            yield from _nested(inner, shown)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _classes(inner)


def _config(cls: type[BaseModel]) -> str:
    said = entries(cls, "Attributes")
    rows = []
    for name, field in cls.model_fields.items():
        default = "needed"
        if field.default is not PydanticUndefined:
            default = f"`{_plain(field.default)!r}`"
        elif field.default_factory is not None:
            default = f"`{_plain(field.get_default(call_default_factory=True))!r}`"
        bounds = [
            f"{sign} {getattr(item, key)}"
            for item in field.metadata
            for key, sign in _BOUNDS.items()
            if getattr(item, key, None) is not None
        ]
        kind = ", ".join([f"`{_type(field.annotation)}`", *bounds])
        rows.append((f"`{field.alias or name}`", kind, default, said.get(name, "")))
    page = f"\n### {cls.__name__}\n\n`{cls.__module__}.{cls.__name__}`. {text(cls)}\n"
    return page + ("\n" + table(("key", "type", "default", "meaning"), rows) if rows else "")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value


def _type(annotation: Any) -> str:
    """An annotation as one writes it, the same in every version of Python."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, arguments))}]"
    return str(getattr(annotation, "__name__", annotation))
