"""Examines a model folder: can it be read, is it complete, does it fit what is installed, and does
its memory fit what is free. The last step loads it and looks at each modality (`live`).

Each step needs those before it; the first that fails ends the examination of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from xoron_core import __version__
from xoron_core.composer.composition import Composition
from xoron_core.composer.planner import plan
from xoron_core.configuration import XoronConfig
from xoron_core.doctor.finding import Finding
from xoron_core.doctor.machine import free_memory, size
from xoron_core.errors import XoronError
from xoron_core.folder import LOCK, check_files, read_config, read_space
from xoron_core.model import XoronModel
from xoron_core.plugins import Registry
from xoron_core.tokens.space import TokenSpace

_COPY_AGAIN = "copy the folder again, whole, from where it was written"


def examine_folder(folder: Path, registry: Registry) -> Iterator[Finding]:
    """Every step from `config.json` to what each modality does in the loaded model."""
    try:
        config, composition = read_config(folder)
        detail = f"{composition.name}, {len(composition.slots)} slots"
        yield Finding("model", "composition", "ok", detail)
        missing = list(_slots(composition, registry))
        yield from missing or [Finding("model", "plug-ins", "ok", "all there")]
        yield from _lock(folder, registry)
        space = read_space(folder, config.token_space_hash)
        shown = "none" if space is None else f"{space.size:,} rows, {space.hash}"
        yield Finding("model", "token space", "ok", shown)
        index = check_files(folder)
        if missing:
            return
        weights = _weights(folder, index, composition, space, registry)
        yield weights
        memory = _memory(plan(composition, registry, lock=space).memory)
        yield memory
        if "wrong" in (weights.state, memory.state):
            return
        yield from _live(folder)
    except XoronError as error:
        # Its message holds the fix already; both are one line here.
        what, _, fix = str(error).rpartition(";")
        yield Finding("model", str(folder), "wrong", what or "cannot be used", fix.strip())


def _live(folder: Path) -> Iterator[Finding]:
    from xoron_core.api import load
    from xoron_core.doctor.live import examine_model

    yield from examine_model(*load(folder, dtype=torch.float32))


def _slots(composition: Composition, registry: Registry) -> Iterator[Finding]:
    """Slots whose component no usable plug-in offers."""
    states = {plugin.origin.distribution: plugin for plugin in registry.plugins}
    for name, slot in composition.slots.items():
        if slot.ref is not None or f"{slot.kind}/{slot.use}" in registry.components(slot.kind):
            continue
        plugin = states.get(slot.distribution)
        if plugin is None:
            state, fix = "is not installed", f"run: pip install {slot.distribution}"
        elif plugin.state == "available":
            state = f"{plugin.origin.version} has no such component"
            fix = f"install the version in the folder's {LOCK}"
        else:
            state = f"is {plugin.state} ({plugin.problem})"
            fix = f"see plug-in {plugin.name}"
        detail = f"needs {slot.kind}/{slot.use}; {slot.distribution} {state}"
        yield Finding("model", name, "wrong", detail, fix)


def _lock(folder: Path, registry: Registry) -> Iterator[Finding]:
    """Versions that the folder was made with, against those installed."""
    try:
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Finding("model", "lock", "note", f"there is no {LOCK}; versions are not known")
        return
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        yield Finding("model", "lock", "wrong", f"{LOCK} is damaged ({error})", _COPY_AGAIN)
        return
    installed = {plugin.origin.distribution: plugin.origin.version for plugin in registry.plugins}
    installed |= {"torch": torch.__version__, "xoron-core": __version__}
    made = {"xoron-core": lock.get("xoron-core", ""), "torch": lock.get("torch", "")}
    made |= lock.get("plugins", {})
    different = [
        f"{name} {version}, now {installed[name]}"
        for name, version in made.items()
        if name in installed and version not in ("", installed[name])
    ]
    if different:
        yield Finding("model", "lock", "note", f"made with {'; '.join(different)}")
    else:
        yield Finding("model", "lock", "ok", "made with the installed versions")


def _weights(
    folder: Path,
    index: dict[str, str],
    composition: Composition,
    space: TokenSpace | None,
    registry: Registry,
) -> Finding:
    """Compares names and shapes in the weight files with the model that would be built."""
    from safetensors import safe_open

    with torch.device("meta"):
        config = XoronConfig(composition=composition.data())
        model = XoronModel(config, space, registry=registry)
    tied = set(model.all_tied_weights_keys)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(index.values())):
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [k for k in expected if k in found and expected[k] != found[k]],
        "not in the index": sorted(found.keys() - index.keys()),
    }
    said = [f"{len(names)} {what}, such as {names[0]}" for what, names in wrong.items() if names]
    if said:
        return Finding("model", "weights", "wrong", "; ".join(said), _COPY_AGAIN)
    files = len(set(index.values()))
    return Finding("model", "weights", "ok", f"{len(found)} tensors in {files} files, complete")


def _memory(estimate: dict[str, int]) -> Finding:
    """The planner's estimate against free memory."""
    free = free_memory()
    weights, training = estimate["weights"], estimate["training"]
    needs = f"weights {size(weights)}, training {size(training)} without activations, in fp32"
    if free is None:
        return Finding("model", "memory", "note", f"{needs}; free memory is unknown here")
    detail = f"{needs}; {size(free)} are free"
    if weights > free:
        fix = (
            "close other programs, use a machine with more memory, or load it in half precision"
            " (dtype=torch.bfloat16)"
        )
        return Finding("model", "memory", "wrong", detail, fix)
    return Finding("model", "memory", "ok" if training <= free else "note", detail)
