"""Writes a working plug-in package from the templates beside this file.

`parts/` holds one module per component kind and `tests/` one test for each; the other templates
are the package around them. They are Jinja, rendered strictly: an unknown name is an error.

Footguns:
- The folder appears whole or not at all; an existing one is never touched.
- Templates are tested by generating every kind and running what they gave (tests/test_scaffold.py).
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import jinja2

from xoron_core import __version__, advice
from xoron_core.descriptors import KINDS
from xoron_core.errors import UsageError, did_you_mean
from xoron_core.hookspecs import API_VERSION
from xoron_core.plugins import Registry
from xoron_core.storage import atomic_folder

SUMMARIES = {
    "tokenizer": "Text as the bytes of UTF-8.",
    "backbone": "A small decoder of transformers' Llama blocks.",
    "encoder": "Patches of samples to features.",
    "projector": "Features to positions of the backbone, one each.",
    "codec": "Samples to ids and back, on the mu-law scale.",
    "autoencoder": "Patches of samples to latents and back.",
    "generator": "Hidden states to samples, by flow matching.",
    "fusion": "Cross-attention of text on media features.",
    "loss": "The absolute error of a reconstruction.",
}
MEDIA_KINDS = ("encoder", "codec", "autoencoder", "generator")
_TEXT_KINDS = ("tokenizer", "backbone", "fusion")
# What each kind's module imports beside xoron-core; the versions are xoron-core's own.
_IMPORTS = {
    "tokenizer": ("tokenizers", "transformers"),
    "backbone": ("pydantic", "torch", "transformers"),
    "encoder": ("numpy", "pydantic", "torch"),
    "projector": ("pydantic", "torch"),
    "codec": ("numpy", "pydantic", "torch"),
    "autoencoder": ("einops", "numpy", "pydantic", "torch"),
    "generator": ("einops", "numpy", "pydantic", "torch"),
    "fusion": ("pydantic", "torch"),
    "loss": ("pydantic", "torch"),
}
# The presets `tiny`: small enough for checks.
_TINY = {
    "tokenizer": "{}\n",
    "backbone": "hidden_size: 64\nintermediate_size: 192\nnum_layers: 2\nnum_heads: 2\n",
    "encoder": "patch_size: 16\nfeature_size: 64\n",
    "projector": "expansion: 2\n",
    "codec": "levels: 64\nmax_length: 32\n",
    "autoencoder": "patch_size: 16\nlatent_size: 8\n",
    "generator": "num_patches: 4\npatch_size: 16\nhidden_size: 64\n",
    "fusion": "layers: [0]\nnum_heads: 2\n",
    "loss": "{}\n",
}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MODALITY = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Design:
    """What is to be written, checked.

    Attributes:
        name: of the distribution, e.g. `xoron-ecg`.
        kinds: of its components, in build order.
        modality: that its media components and its slots belong to; `text` where there is none.
        owner: the distribution that declares the modality, or None where the package does itself.
        groups: token groups that hold the modality's markers.
    """

    name: str
    kinds: tuple[str, ...]
    modality: str
    owner: str | None
    groups: tuple[str, ...]

    @property
    def package(self) -> str:
        """The import name."""
        return self.name.replace("-", "_")

    @property
    def plugin(self) -> str:
        """The plug-in's name, which its components carry too."""
        return self.name.removeprefix("xoron-")

    @property
    def declares(self) -> bool:
        """Whether the package declares the modality."""
        return self.owner is None and self.modality != "text"


def design(name: str, kinds: Sequence[str], *, modality: str | None, registry: Registry) -> Design:
    """Checks a request against what is installed.

    Args:
        name: of the distribution.
        kinds: of component, at least one; a loss of a new modality brings an autoencoder to judge.
        modality: needed by every kind but tokenizer, backbone and fusion.
        registry: the installed plug-ins.

    Raises:
        UsageError: naming what is wrong and what would do.
    """
    _check_name(name, registry)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        got = f"got {unknown[0]!r}.{did_you_mean(unknown[0], KINDS)}" if unknown else "got none."
        raise UsageError(f"--kind: expected some of {', '.join(KINDS)}; {got}")
    ordered = tuple(kind for kind in KINDS if kind in kinds)
    if all(kind in _TEXT_KINDS for kind in ordered):
        if modality not in (None, "text"):
            raise UsageError(f"--modality {modality}: a {ordered[0]} belongs to text; leave it out")
        return Design(name, ordered, "text", None, ())
    owner, groups = _check_modality(name, modality, ordered, registry)
    if "loss" in ordered and owner is None:  # what a loss alone would judge
        ordered = tuple(kind for kind in KINDS if kind in (*kinds, "autoencoder"))
    return Design(name, ordered, str(modality), owner, groups)


def write(plan: Design, parent: Path) -> Path:
    """Writes the package under `parent` and returns its folder.

    Raises:
        UsageError: if the folder exists.
        FolderError: if it cannot be written; nothing is left then.
    """
    folder = parent / plan.name
    if folder.exists():
        raise UsageError(f"{folder}: exists; choose another name or another --path")
    with atomic_folder(folder) as aside:
        for path, text in render(plan).items():
            target = aside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return folder


def render(plan: Design) -> dict[str, str]:
    """Every file of the package: path to text."""
    source = f"src/{plan.package}"
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "CHANGELOG.md": "CHANGELOG.md",
        f"{source}/__init__.py": "init.py",
        f"{source}/plugin.py": "plugin.py",
        f"{source}/config.py": "config.py",
        "tests/test_conformance.py": "tests/conformance.py",
    }
    if plan.declares or any(kind in MEDIA_KINDS for kind in plan.kinds):
        templates[f"{source}/media.py"] = "media.py"
    for kind in plan.kinds:
        templates[f"{source}/{kind}.py"] = f"parts/{kind}.py"
        templates[f"tests/test_{kind}.py"] = f"tests/{kind}.py"
    values = _values(plan)
    environment = jinja2.Environment(  # noqa: S701 - writes Python and TOML, never HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    here = resources.files(__name__)
    files = {
        path: environment.from_string(
            here.joinpath(f"{template}.tmpl").read_text(encoding="utf-8")
        ).render(values)
        for path, template in templates.items()
    }
    files[f"{source}/py.typed"] = ""
    presets = {f"{kind}-tiny": _TINY[kind] for kind in plan.kinds}
    if values["slots"]:
        presets["tiny"] = values["example"]
    return files | {f"{source}/presets/{stem}.yaml": text for stem, text in presets.items()}


def _values(plan: Design) -> dict[str, Any]:
    """What the templates may name."""
    # Text has one backbone and one tokenizer: being installed must not choose which.
    slots = [kind for kind in plan.kinds if kind not in _TEXT_KINDS]
    what = plan.kinds[0] if len(plan.kinds) == 1 else "plug-in"
    return {
        "api": API_VERSION,
        "declares": plan.declares,
        "description": f"A xoron {what} for {plan.modality}.",
        "example": _example(plan, slots),
        "groups": plan.groups,
        "kinds": list(plan.kinds),
        "modality": plan.modality,
        "modality_of": {k: "text" if k in _TEXT_KINDS else plan.modality for k in plan.kinds},
        "name": plan.name,
        "package": plan.package,
        "plugin": plan.plugin,
        "prefix": "".join(word.capitalize() for word in plan.plugin.split("-")),
        "reads_media": any(kind in MEDIA_KINDS for kind in plan.kinds),
        "requirements": _requirements(plan),
        "slots": slots,
        "summaries": SUMMARIES,
    }


def _requirements(plan: Design) -> list[str]:
    """What the package needs, in the versions that xoron-core asks for itself."""
    ours = {re.split(r"[^\w-]", text)[0]: text for text in requires("xoron-core") or ()}
    names = {name for kind in plan.kinds for name in _IMPORTS[kind]}
    names |= {"numpy"} if plan.declares else set()
    series = ".".join(__version__.split(".")[:2])
    owner = {plan.owner} - {None, "xoron-core"}
    return sorted({f"xoron-core>={series}", *(ours[name] for name in names), *map(str, owner)})


def _example(plan: Design, slots: Sequence[str]) -> str:
    """The YAML that fills its slots, those of its modality or else those of text."""
    lines = [f"{kind}: {{use: {plan.plugin}, preset: tiny}}\n" for kind in slots or plan.kinds]
    return "".join([f"{plan.modality}:\n", *(f"  {line}" for line in lines)] if slots else lines)


def _check_name(name: str, registry: Registry) -> None:
    normal = re.sub(r"[-_.]+", "-", name).lower()
    if not _NAME.fullmatch(name):
        hint = f", such as {normal!r}" if _NAME.fullmatch(normal) else ", such as 'xoron-ecg'"
        raise UsageError(
            f"{name!r} is no name for a package: expected lower-case words joined by hyphens{hint}"
        )
    package, plugin = name.replace("-", "_"), name.removeprefix("xoron-")
    if not package.isidentifier() or keyword.iskeyword(package):
        raise UsageError(f"{name!r}: {package!r} cannot be imported; begin with a letter")
    taken = package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None
    if taken:
        raise UsageError(f"{name!r}: a module {package!r} is here already; choose another name")
    known = {installed.name: installed.origin.distribution for installed in registry.plugins}
    owner = known.get(plugin) or advice.install_plugin(plugin)
    if owner:
        raise UsageError(f"{name!r}: {plugin!r} is the plug-in of {owner}; choose another name")


def _check_modality(
    name: str, modality: str | None, kinds: Sequence[str], registry: Registry
) -> tuple[str | None, tuple[str, ...]]:
    """The distribution that declares the modality, if any, and the groups of its markers."""
    if modality is None:
        raise UsageError(f"--modality: the kind {kinds[0]} needs one, e.g. --modality ecg")
    if not _MODALITY.fullmatch(modality) or keyword.iskeyword(modality) or modality == "text":
        raise UsageError(
            f"--modality {modality!r}: expected a lower-case word such as ecg, not text"
        )
    marks = {f"<|{mark}|>" for mark in (modality, f"/{modality}", f"{modality}_pad")}
    marks |= {f"<|gen_{modality}|>", f"<|/gen_{modality}|>"}
    holders = _holders(marks, registry)
    for plugin in registry.available:
        if modality in (declared.name for declared in plugin.contribution.modalities):
            return plugin.origin.distribution, tuple(sorted(set(holders.values())))
    if holders:
        string, group = next(iter(holders.items()))
        package = advice.install_slot(f"{modality}.encoder") or advice.install_slot(
            f"{modality}.codec"
        )
        fix = f"run: pip install {package}" if package else "choose another word"
        raise UsageError(
            f"--modality {modality}: its marker {string} is a special token of {group} already;"
            f" {fix}"
        )
    return None, (f"{name}/{modality}",)


def _holders(strings: set[str], registry: Registry) -> Mapping[str, str]:
    """Of these special strings, those that an installed group has, with the group's name."""
    return {
        string: group.name
        for group in registry.token_groups().values()
        for string in group.tokens.values()
        if string in strings
    }
