"""What holds of a plug-in as a whole: how it loads, and that it needs no other modality."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from xoron_core.composer.composition import component_config, fragments, parse_composition
from xoron_core.config import Source
from xoron_core.descriptors import resolve
from xoron_core.discovery import discover
from xoron_core.errors import PluginError, XoronError
from xoron_core.plugins import Registry
from xoron_core.testing.catalogue import PLUGIN, check
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.target import Target

FRAMEWORKS = (
    "torch",
    "transformers",
    "tensorflow",
    "jax",
    "diffusers",
    "torchvision",
    "torchaudio",
)
HEAVY = (*FRAMEWORKS, "numpy", "scipy", "pandas", "PIL", "cv2", "av", "soundfile", "pydantic")
_CONFIGS = """
import importlib, json, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
print("\\n" + json.dumps({"modules": sorted({m.partition(".")[0] for m in sys.modules}),
                         "changed": []}))
"""
_ALONE = """
import json, sys
blocked = set(filter(None, sys.argv[2].split(",")))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"no module {name!r}: its package is absent", name=name)
sys.meta_path.insert(0, Absent())
from xoron_core.testing.checks.plugin import build_alone
print("\\n" + json.dumps({"modules": [], "changed": build_alone(sys.argv[1])}))
"""


@check("loads", PLUGIN, since=1, summary="the plug-in loads and is available", needs=())
def loads(target: Target) -> None:
    who = f"plug-in {target.name!r} ({target.distribution})"
    if problem := target.probe.problem:
        raise CheckFailed(
            f"{who}: importing {target.point.value} and calling its hooks in a process of its own"
            f" {problem}; a plug-in module only returns descriptors"
        )
    if target.plugin.state != "available":
        raise CheckFailed(f"{who} is {target.plugin.state}: {target.plugin.problem}")


@check(
    "light-import",
    PLUGIN,
    since=1,
    summary="the module of the entry point imports nothing heavy and changes nothing",
    needs=("loads",),
)
def light_import(target: Target) -> None:
    module, probe = target.point.value, target.probe
    if heavy := sorted(probe.modules & set(HEAVY)):
        raise CheckFailed(
            f"{module} and its hooks import {', '.join(heavy)}; move what needs them to the module"
            " that `factory` names, which is imported only when the component is built"
        )
    if probe.output:
        raise CheckFailed(f"{module} prints {probe.output[:80]!r} on import; a plug-in is silent")
    if probe.changed:
        raise CheckFailed(
            f"{module} changes the {', '.join(probe.changed)} on import; do it in the component"
        )


@check(
    "light-config",
    PLUGIN,
    since=1,
    summary="modules of configs import no framework, so that plans and schemas stay light",
    needs=("loads",),
)
def light_config(target: Target) -> None:
    components = target.plugin.contribution.components
    if not components:
        raise CheckSkipped("the plug-in offers no component")
    modules = dict.fromkeys(component.config.partition(":")[0] for component in components)
    probe = target.run(_CONFIGS, ",".join(modules))
    if probe.problem:
        raise CheckFailed(
            f"importing the config modules {', '.join(modules)} {probe.problem}; `config` of each"
            " Component must name an importable module"
        )
    if heavy := sorted(probe.modules & set(FRAMEWORKS)):
        raise CheckFailed(
            f"importing {', '.join(modules)} imports {', '.join(heavy)}; keep configs in a module"
            " of their own without it (import it inside functions)"
        )


@check(
    "idempotent-hooks",
    PLUGIN,
    since=1,
    summary="hooks return the same data however often they are called",
    needs=("loads",),
)
def idempotent_hooks(target: Target) -> None:
    first = target.plugin.contribution
    again = discover([*target.others, target.point]).plugin(target.name)
    if again.problem:
        raise CheckFailed(f"registered a second time it is {again.state}: {again.problem}")
    for name in ("components", "modalities", "presets", "token_groups", "commands", "extras"):
        if getattr(first, name) != getattr(again.contribution, name):
            raise CheckFailed(
                f"xoron_{name} returns something else on its second call; hooks return fresh, equal"
                " data and keep no state"
            )


@check(
    "presets", PLUGIN, since=1, summary="every preset parses against the configs", needs=("loads",)
)
def presets(target: Target) -> None:
    found = target.plugin.contribution.presets
    if not found:
        raise CheckSkipped("the plug-in ships no preset")
    components = target.registry.components()
    for preset in found:
        where = f"preset {preset.name!r} ({preset.resource})"
        try:
            if preset.component is None:
                parse_composition(*fragments(target.registry, preset.name), target.registry)
            elif preset.component in components:
                component = components[preset.component]
                body = {"preset": preset.name}
                component_config(target.registry, component, body, Source(where))
            else:
                raise CheckFailed(f"{where} is for {preset.component}, which no plug-in offers")
        except XoronError as error:
            raise CheckFailed(f"xoron_presets: {where}: {error}") from error


@check(
    "absent",
    PLUGIN,
    since=1,
    summary="a model that needs the absent plug-in names the distribution to install",
    needs=("loads",),
)
def absent(target: Target) -> None:
    from xoron_core.folder import open_model

    components = target.plugin.contribution.components
    if not components:
        raise CheckSkipped("the plug-in offers no component")
    if target.point.dist is None:
        raise CheckSkipped("bare source is of no distribution that could be installed")
    without = Registry(p for p in target.registry.plugins if p.name != target.name)
    for component in components:
        slot = {
            "kind": component.kind,
            "use": component.name,
            "modality": component.modality,
            "distribution": target.distribution,
        }
        data = {"name": "absent", "slots": {"part": slot}}
        with tempfile.TemporaryDirectory() as folder:
            config = {"model_type": "xoron", "composition": data}
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            try:
                open_model(_never, folder, registry=without)
            except PluginError as error:
                if target.distribution in str(error):
                    continue
                raise CheckFailed(
                    f"without the plug-in, {component.key} is asked for with {str(error)!r}, which"
                    f" does not name {target.distribution}"
                ) from error
        raise CheckFailed(
            f"without the plug-in, a model with {component.key} opens; another plug-in offers the"
            " same (kind, name): rename one"
        )


@check(
    "alone",
    PLUGIN,
    since=1,
    summary="every component builds with all other plug-ins absent, but those it depends on",
    needs=("loads",),
)
def alone(target: Target) -> None:
    if not target.plugin.contribution.components:
        raise CheckSkipped("the plug-in offers no component")
    probe = target.run(_ALONE, target.given, ",".join(_foreign(target)))
    if probe.problem:
        raise CheckFailed(f"with the other plug-ins absent, building {probe.problem}")
    if probe.changed:
        raise CheckFailed(
            "with the other plug-ins absent: "
            + "; ".join(probe.changed)
            + ". Declare the package in pyproject's dependencies, or import it where it is used"
        )


def build_alone(given: str) -> list[str]:
    """Builds every component of a plug-in on the meta device; returns what failed, in words."""
    from xoron_core.testing.subject import Subject
    from xoron_core.testing.target import find

    target = find(given)
    problems = []
    with target.on_path():
        target.registry = target.alone
        for component in target.plugin.contribution.components:
            if problem := _build(Subject(target, component)):
                problems.append(f"{component.key}: {problem}")
    return problems


def _build(subject: Any) -> str:
    import torch

    try:
        resolve(subject.component.factory)
        with torch.device("meta"):
            subject.build()
    except XoronError:
        return ""  # says in one message which part a composition must add
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _foreign(target: Target) -> list[str]:
    """Top-level packages of the other plug-ins, without those that this one requires."""
    required = {"xoron-core", *_requirements(target.point)}
    for point in target.others:
        if _distribution(point) in _requirements(target.point):
            required |= _requirements(point)
    strangers = (point for point in target.others if _distribution(point) not in required)
    return sorted({point.value.partition(".")[0] for point in strangers})


def _distribution(point: EntryPoint) -> str:
    return canonicalize_name(point.dist.metadata["Name"]) if point.dist else ""


def _requirements(point: EntryPoint) -> set[str]:
    """Distributions that the one of an entry point needs in any case, without its extras."""
    found = [Requirement(text) for text in (point.dist.requires or () if point.dist else ())]
    return {
        canonicalize_name(requirement.name)
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }


def _never(*_: object, **__: object) -> None:
    raise AssertionError("the plug-in check comes before the weights")
