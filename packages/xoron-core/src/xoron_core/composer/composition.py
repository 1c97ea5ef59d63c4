"""The declared model: which component, with which config, in which slot.

Two forms of one thing. What people write is nested YAML (`image: {encoder: {use: siglip}}`), in
which a mapping with `use` or `ref` is a slot and any other mapping a name space. What a model
folder carries is `Composition`: flat slots, every config resolved to plain values, so that it
reads without the plug-ins and does not change when a preset does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal, cast

from pydantic import Field, field_validator

from xoron_core import advice
from xoron_core.config import Config, Source, apply_overrides, merge, parse_yaml, read_yaml
from xoron_core.descriptors import KINDS, Component, Kind, resolve
from xoron_core.errors import CompositionError, ConfigError, PluginError, did_you_mean
from xoron_core.plugins import Registry

_SLOT_KEYS = ("use", "preset", "freeze", "ref")
_TOP_KEYS = ("name", "tokens")


class TokensConfig(Config):
    """What goes into the token space beside the text base and the codecs.

    Attributes:
        groups: names of special-token groups (`control` means `xoron-core/control`), or `all`.
        template: `xoron` for our chat template and BOS/EOS/PAD, `base` for the tokenizer's own;
            None is `base` over pretrained weights and `xoron` otherwise.
        placeholders: modality to the special token that stands for its media, if not the one of
            the modality itself; a selected group must have it.
        markers: modality to the special tokens before and behind media that are shown, likewise.
    """

    groups: tuple[str, ...] | Literal["all"] = ("control", "conversation")
    template: Literal["xoron", "base"] | None = None
    placeholders: dict[str, str] = Field(default_factory=dict)
    markers: dict[str, tuple[str, str]] = Field(default_factory=dict)


class Route(Config):
    """Which slot of a modality reads media and which makes them (`encoder`, `codec`, ...)."""

    in_: str | None = Field(default=None, alias="in")
    out: str | None = None


class Slot(Config):
    """One filled slot, resolved.

    Attributes:
        use: the component's name; its kind, modality and plug-in stand beside it so that the
            folder can say what is missing.
        ref: another slot whose instance this one shares; then nothing else is set.
        freeze: whether its parameters stay as they are in training.
        config: the component's config as plain data.
        hidden_size, feature_size: widths it was built between (see `components.Context`).
        fusion_layers: of a fusion, where the backbone takes one.
    """

    kind: Kind
    use: str = ""
    modality: str = ""
    distribution: str = ""
    ref: str | None = None
    freeze: bool = False
    config: dict[str, Any] = Field(default_factory=dict)
    hidden_size: int | None = None
    feature_size: int | None = None
    fusion_layers: tuple[int, ...] = ()


class Composition(Config):
    """A model, declared. `slots` are in build order, whatever order they were written in (JSON
    files are saved with sorted keys)."""

    name: str
    slots: dict[str, Slot]
    tokens: TokensConfig = TokensConfig()
    routes: dict[str, Route] = Field(default_factory=dict)

    @field_validator("slots")
    @classmethod
    def _in_build_order(cls, slots: dict[str, Slot]) -> dict[str, Slot]:
        return dict(sorted(slots.items(), key=lambda item: (KINDS.index(item[1].kind), item[0])))

    @property
    def template(self) -> Literal["xoron", "base"]:
        """The chat template: over pretrained weights the one they were trained with."""
        pretrained = any(slot.config.get("path") for slot in self.of_kind("backbone").values())
        return self.tokens.template or ("base" if pretrained else "xoron")

    def of_kind(self, kind: str) -> dict[str, Slot]:
        """Slots filled by components of one kind, without references."""
        return {n: s for n, s in self.slots.items() if s.kind == kind and s.ref is None}


def fragments(registry: Registry, preset: str) -> tuple[dict[str, Any], Source]:
    """Merges the composition fragments that the plug-ins ship under one preset name.

    Raises:
        ConfigError: if no plug-in has the preset, listing those there are.
    """
    found = registry.presets(preset)
    if not found:
        names = registry.preset_names()
        raise ConfigError(
            f"no selected plug-in has a composition preset {preset!r}.{did_you_mean(preset, names)}"
            f" There are: {', '.join(names) or 'none'}; plug-ins in use:"
            f" {', '.join(p.name for p in registry.available)}.{_preset_advice(registry, names)}"
        )
    data: dict[str, Any] = {"name": preset}
    lines: dict[tuple[str | int, ...], int] = {}
    for _, item in found:
        piece, source = _resource(item.resource)
        data = merge(data, piece)
        lines.update(source.lines)
    return data, Source(f"preset {preset!r}", lines if len(found) == 1 else {})


def read_composition(
    registry: Registry,
    *,
    file: str | None = None,
    preset: str | None = None,
    overrides: Iterable[str] = (),
    data: Mapping[str, Any] | None = None,
    addition: bool = False,
) -> Composition:
    """Reads a composition from a preset, a YAML file or plain data, with overrides on top.

    Args:
        registry: the plug-ins to choose from.
        file: a YAML file; merged over the preset if both are given.
        preset: a composition preset; `tiny` if neither a file nor data is given.
        overrides: `a.b=c` items.
        data: plain nested data, as the YAML would hold.
        addition: whether this is added to another composition; it then needs to fill no slot, and
            no preset is implied.

    Raises:
        ConfigError, PluginError, CompositionError: naming file, line and the fix.
    """
    nested: dict[str, Any] = {}
    source = Source("composition")
    if preset or (file is None and data is None and not addition):
        nested, source = fragments(registry, preset or "tiny")
    if file is not None:
        written, source = read_yaml(file)
        nested = merge(nested, written)
    if data is not None:
        nested = merge(nested, data)
    declared = apply_overrides(nested, list(overrides))
    return parse_composition(declared, source, registry, may_be_empty=addition)


def parse_composition(
    data: Mapping[str, Any], source: Source, registry: Registry, *, may_be_empty: bool = False
) -> Composition:
    """Resolves nested data to a `Composition`: components found, presets merged, configs typed."""
    slots: dict[str, dict[str, Any]] = {}
    routes: dict[str, Any] = {}
    known_modalities = set(registry.modalities())
    for key, value in data.items():
        if key in _TOP_KEYS:
            continue
        if not isinstance(value, Mapping):
            options = [*_TOP_KEYS, "backbone", "tokenizer", *known_modalities]
            raise ConfigError(
                f"{source.place((key,))}: {key!r} holds {value!r}; expected a slot such as"
                f" {{use: NAME}}.{did_you_mean(key, options)}"
            )
        inner = dict(value)
        if "routes" in inner and not _is_slot(inner):
            routes[key] = Route.parse(inner.pop("routes"), source.under(key, "routes")).data()
        _collect_slots(inner, (key,), slots, source)
    if not slots and not may_be_empty:
        raise CompositionError(
            f"{source.name}: no slot is filled; expected at least one, such as"
            " backbone: {use: xoron-moe}"
        )
    resolved = {
        name: _resolve_slot(name, body, source.under(*name.split(".")), registry)
        for name, body in slots.items()
    }
    for name, slot in resolved.items():
        _check_reference(name, slot, resolved, source)
        resolved[name] = _beside(resolved[name], resolved, registry)
    return Composition.parse(
        {
            "name": data.get("name", "xoron-model"),
            "slots": {n: slot.model_dump(mode="json") for n, slot in resolved.items()},
            "tokens": TokensConfig.parse(data.get("tokens", {}), source.under("tokens")).data(),
            "routes": routes,
        },
        source,
    )


def component_config(
    registry: Registry, component: Component, body: Mapping[str, Any], source: Source
) -> Config:
    """Types a component's config: its preset first, then the written keys over it."""
    preset = body.get("preset")
    data: dict[str, Any] = {}
    if preset is not None:
        found = registry.presets(preset, component.key)
        if not found:
            names = registry.preset_names(component.key)
            raise ConfigError(
                f"{source.place(('preset',))}: {component.key} has no preset {preset!r}."
                f"{did_you_mean(str(preset), names)} There are: {', '.join(names) or 'none'}."
            )
        data, _ = _resource(found[0][1].resource)
    written = {key: value for key, value in body.items() if key not in _SLOT_KEYS}
    cls = cast(type[Config], _import(component.config, component, registry))
    config = cls.parse(merge(data, written), source)
    resolver = getattr(config, "resolved", None)
    return resolver() if resolver is not None else config


def load_factory(registry: Registry, component: Component) -> Any:
    """Imports a component's class.

    Raises:
        PluginError: if the import fails, naming the distribution and what it requires.
    """
    return _import(component.factory, component, registry)


def _import(reference: str, component: Component, registry: Registry) -> Any:
    try:
        return resolve(reference)
    except (ImportError, AttributeError, OSError) as error:
        owner = registry.provider(component).origin.distribution
        needs = (
            f" It requires: pip install {' '.join(component.requires)}."
            if component.requires
            else ""
        )
        raise PluginError(
            f"component {component.key} of {owner}: {reference} cannot be imported"
            f" ({type(error).__name__}: {error}).{needs}"
        ) from error


def _preset_advice(registry: Registry, names: list[str]) -> str:
    """What to install where no plug-in brings any composition preset."""
    package = advice.install_slot("backbone")
    if names or any(plugin.origin.distribution == package for plugin in registry.plugins):
        return ""
    return f" The usual ones come with: pip install {package}"


def _is_slot(value: Mapping[str, Any]) -> bool:
    return "use" in value or "ref" in value


def _collect_slots(
    value: Mapping[str, Any],
    path: tuple[str, ...],
    slots: dict[str, dict[str, Any]],
    source: Source,
) -> None:
    name = ".".join(path)
    if _is_slot(value):
        if any("__" in part or not part.isidentifier() for part in path):
            raise ConfigError(
                f"{source.place(path)}: {name!r} is no slot name; expected dotted identifiers"
                " without double underscores"
            )
        slots[name] = dict(value)
        return
    for key, inner in value.items():
        if not isinstance(inner, Mapping):
            package = advice.install_slot(name)
            hint = f" (its usual component comes with: pip install {package})" if package else ""
            raise ConfigError(
                f"{source.place((*path, key))}: slot {name!r} names no component; add"
                f" `use: NAME`{hint}"
            )
        _collect_slots(inner, (*path, key), slots, source)


def _resolve_slot(name: str, body: dict[str, Any], source: Source, registry: Registry) -> Slot:
    if "ref" in body:
        if set(body) - {"ref"}:
            raise ConfigError(f"{source.place(('ref',))}: slot {name!r}: `ref` stands alone")
        return Slot(kind="encoder", ref=str(body["ref"]))
    component = _find(name, str(body["use"]), source, registry)
    config = component_config(registry, component, body, source)
    return Slot(
        kind=component.kind,
        use=component.name,
        modality=component.modality,
        distribution=registry.provider(component).origin.distribution,
        freeze=bool(body.get("freeze", False)),
        config=config.data(),
    )


def _beside(slot: Slot, slots: Mapping[str, Slot], registry: Registry) -> Slot:
    """The slot with what its config takes over from others, as a tokenizer from its backbone."""
    if slot.ref is not None:
        return slot
    component = registry.component(slot.kind, slot.use)
    cls = _import(component.config, component, registry)
    if not hasattr(cls, "beside"):
        return slot
    others = {name: other.config for name, other in slots.items() if other.ref is None}
    return slot.model_copy(update={"config": cls.parse(slot.config).beside(others).data()})


def _find(slot: str, use: str, source: Source, registry: Registry) -> Component:
    """The component called `use`: `kind/name`, or a name that its slot or uniqueness decides."""
    kind, slash, name = use.partition("/")
    if slash and kind in KINDS:
        return registry.component(kind, name)
    last = slot.rsplit(".", 1)[-1]
    if last in KINDS and f"{last}/{use}" in registry.components(last):
        return registry.component(last, use)
    named = registry.named(use)
    if len(named) == 1:
        return named[0]
    if len(named) > 1:
        keys = ", ".join(component.key for component in named)
        raise CompositionError(
            f"{source.place(('use',))}: slot {slot!r}: {use!r} is several components; write one of"
            f" {keys}"
        )
    if last in KINDS and advice.install_component(f"{last}/{use}"):
        return registry.component(last, use)  # raises with the package to install
    options = [c.name for c in registry.components(last if last in KINDS else None).values()]
    package = advice.install_slot(slot)
    install = f" Components for this slot come with: pip install {package}." if package else ""
    raise PluginError(
        f"{source.place(('use',))}: slot {slot!r}: no installed plug-in offers {use!r}."
        f"{did_you_mean(use, options)}{install if not options else ''}"
        f"{' Installed: ' + ', '.join(sorted(options)) + '.' if options else ''}"
        f"{_unusable(registry)}"
    )


def _unusable(registry: Registry) -> str:
    """The plug-ins whose components are not known, since what is looked for may be theirs."""
    return "".join(
        f" Plug-in {plugin.name!r} ({plugin.origin.distribution}) is {plugin.state}:"
        f" {plugin.problem}."
        for plugin in registry.plugins
        if plugin.state in ("broken", "incompatible")
    )


def _check_reference(name: str, slot: Slot, slots: dict[str, Slot], source: Source) -> None:
    if slot.ref is None:
        return
    target = slots.get(slot.ref)
    if target is None or target.ref is not None:
        raise CompositionError(
            f"{source.name}: slot {name!r} refers to {slot.ref!r}, which is no filled slot;"
            f" there are: {', '.join(n for n, s in slots.items() if s.ref is None)}"
        )
    slots[name] = target.model_copy(update={"ref": slot.ref, "config": {}, "use": target.use})


def _resource(reference: str) -> tuple[dict[str, Any], Source]:
    package, _, path = reference.partition(":")
    try:
        importlib.import_module(package)
        text = resources.files(package).joinpath(path).read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise PluginError(
            f"preset resource {reference!r} cannot be read ({error}); reinstall the package that"
            " ships it"
        ) from error
    return parse_yaml(text, reference)
