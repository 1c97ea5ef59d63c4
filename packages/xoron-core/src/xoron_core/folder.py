"""The model folder: written whole or not at all, checked before it is opened.

    config.json                    XoronConfig with the resolved composition
    token_space.json               the authority on ids
    tokenizer.json, ...            generated from it (by the processor)
    generation_config.json
    slots/<slot>-00001.safetensors one file set per slot
    model.safetensors.index.json   the index that transformers reads
    xoron.lock.json                versions of what it was composed with
    README.md                      model card

Losses have no files: their parameters are of training only, and start anew in a model that is
opened. Nothing is called `model.safetensors`: transformers would prefer it to the index.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xoron_core import __version__, card
from xoron_core.components import Loss, Part
from xoron_core.composer.composition import Composition
from xoron_core.composer.parts import build_part
from xoron_core.configuration import XoronConfig
from xoron_core.errors import FolderError, PluginError, TokenSpaceError
from xoron_core.nn.memory import align_weights
from xoron_core.plugins import Registry
from xoron_core.plugins import registry as installed
from xoron_core.storage import (
    atomic_folder,
    check_tensors,
    link,
    read_tensors,
    recover,
    write_tensors,
)
from xoron_core.tokens.space import TokenSpace

if TYPE_CHECKING:
    from xoron_core.model import XoronModel

INDEX = "model.safetensors.index.json"
SPACE = "token_space.json"
LOCK = "xoron.lock.json"
MAX_SHARD_BYTES = 5 * 1000**3


def save_model(
    model: XoronModel,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **_: Any,
) -> None:
    """Writes a model folder; files there that are not the model's (the tokenizer's) are kept.

    Args:
        model: what to save.
        folder: where; replaced whole when the new one is complete.
        state_dict: weights to save instead of the model's own, e.g. gathered from shards.
        is_main_process: only this process writes.
        max_shard_bytes: a slot larger than this is split over several files.

    Raises:
        FolderError: if writing fails; an earlier model at `folder` is then intact.
    """
    if not is_main_process:
        return
    with atomic_folder(folder) as aside:
        if Path(folder).is_dir():
            _carry_over(Path(folder), aside)
        write_model(model, aside, state_dict=state_dict, max_shard_bytes=max_shard_bytes)


def write_model(
    model: XoronModel,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    unchanged: Mapping[str, Path] | None = None,
) -> None:
    """Writes the model's files into an existing folder, without the swap of `save_model`.

    Args:
        model, state_dict, max_shard_bytes: as for `save_model`.
        folder: where to write.
        unchanged: slot to a model folder that holds it as it is now and is never written to; its
            files are linked instead of written again.
    """
    state = dict(state_dict if state_dict is not None else model.state_dict())
    of_training = tuple(_prefix(slot) for slot in model.composition.of_kind("loss"))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(of_training)}
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    index: dict[str, str] = {}
    (folder / "slots").mkdir(exist_ok=True)
    for slot, tensors in _by_slot(state, model.composition).items():
        if linked := _link_slot((unchanged or {}).get(slot), folder, tensors):
            index.update(linked)
            continue
        for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
            name = f"slots/{slot}-{number:05d}.safetensors"
            write_tensors(folder / name, shard, {"slot": slot})
            index.update(dict.fromkeys(shard, name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    model.config.architectures = ["XoronModel"]
    model.config.dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    model.config.save_pretrained(folder)
    if model.backbone is not None and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if model.space is not None:
        model.space.save(folder / SPACE)
    _write_json(folder / LOCK, lock_data(model.composition))
    (folder / "README.md").write_text(card.render(model), encoding="utf-8")


def lock_data(composition: Composition, registry: Registry | None = None) -> dict[str, Any]:
    """Versions of what a composition is made of."""
    registry = registry or installed()
    versions = {plugin.origin.distribution: plugin.origin.version for plugin in registry.plugins}
    used = sorted({s.distribution for s in composition.slots.values() if s.distribution})
    return {
        "format": 1,
        "xoron-core": __version__,
        "torch": torch.__version__,
        "plugins": {name: versions.get(name, "") for name in used},
    }


def read_config(folder: str | Path) -> tuple[XoronConfig, Composition]:
    """Reads the config of a model folder, without any plug-in.

    Raises:
        FolderError: if it is no model folder.
    """
    folder = Path(folder)
    recover(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise FolderError(
            f"{folder}: there is no such folder; expected a model folder, as"
            " `xoron compose -o` writes"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{folder}: is not a model folder (it has no config.json); `xoron compose -o {folder}`"
            " writes one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); copy it again") from None
    if data.get("model_type") != XoronConfig.model_type:
        raise FolderError(
            f"{folder}: holds a model of type {data.get('model_type')!r}, expected 'xoron'; to"
            " use it as a backbone, compose with backbone: {use: hf, path: ...}"
        )
    config = XoronConfig.from_pretrained(folder)
    return config, Composition.parse(config.composition)


def read_space(folder: str | Path, expected_hash: str | None) -> TokenSpace | None:
    """Reads and verifies a folder's token space.

    Raises:
        FolderError, TokenSpaceError: if it is missing, damaged or not the config's.
    """
    if expected_hash is None:
        return None
    path = Path(folder) / SPACE
    space = TokenSpace.load(path)
    if space.hash != expected_hash:
        raise TokenSpaceError(
            f"{path}: token space {space.hash} does not match {expected_hash}, with which the"
            " weights were saved; restore the folder's own token_space.json"
        )
    return space


def check_files(folder: str | Path) -> dict[str, str]:
    """Opens every weight file's header and returns the index (tensor name to file).

    Raises:
        FolderError: naming the file that is missing or truncated.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise FolderError(f"{folder}: has no {INDEX}; copy the folder again, whole") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise FolderError(f"{folder / INDEX}: is damaged ({error}); copy it again") from None
    for name in sorted(set(index.values())):
        check_tensors(folder / name)
    return dict(index)


def open_model(from_pretrained: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs transformers' `from_pretrained` on a folder, with the checks it does not make."""
    wants_info = kwargs.pop("output_loading_info", False)
    folder = local_folder(path, kwargs)
    config, composition = read_config(folder)
    kwargs.setdefault("config", config)
    if isinstance(kwargs["config"], XoronConfig) and "space" not in kwargs:
        kwargs["space"] = read_space(folder, kwargs["config"].token_space_hash)
    _check_plugins(composition, kwargs.get("registry"))
    check_files(folder)
    model, info = from_pretrained(str(folder), *args, output_loading_info=True, **kwargs)
    wrong = {key: sorted(info.get(key) or ()) for key in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()) or info.get("mismatched_keys"):
        raise FolderError(
            f"{folder}: weights do not fit the composition;"
            f" missing: {_some(wrong['missing_keys'])};"
            f" unexpected: {_some(wrong['unexpected_keys'])};"
            f" of another shape: {_some(sorted(map(str, info.get('mismatched_keys') or ())))}."
            " Copy the folder again, or load it with the package versions in its xoron.lock.json"
        )
    _build_losses(model, kwargs.get("registry"))
    align_weights(model)
    for name, parameter in model.named_parameters():
        if name in model.frozen:  # transformers puts a trainable one in its place
            parameter.requires_grad_(False)
    return (model, info) if wants_info else model


def load_slot(folder: str | Path, slot: str, *, registry: Registry | None = None) -> nn.Module:
    """Opens one slot of a model folder; the plug-ins of the other slots are not needed.

    Raises:
        FolderError: if the folder has no such slot or its files are damaged.
        PluginError: if this slot's own plug-in is missing.
    """
    config, composition = read_config(folder)
    record = composition.slots.get(slot)
    unsaved = ("tokenizer", "loss")
    if record is None or record.kind in unsaved:
        names = [n for n, s in composition.slots.items() if s.kind not in unsaved]
        raise FolderError(f"{folder}: has no slot {slot!r}; it has: {', '.join(names)}")
    if record.ref is not None:
        slot, record = record.ref, composition.slots[record.ref]
    index = check_files(folder)
    space = read_space(folder, config.token_space_hash)
    prefix = _prefix(slot)
    files = sorted({file for name, file in index.items() if name.startswith(prefix)})
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = read_tensors(Path(folder) / file)
        state.update({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    part = build_part(registry or installed(), slot, record, space=space, parts={}, seed=0)
    missing, unexpected = part.load_state_dict(state, strict=False)
    tied = {
        name for name, tensor in part.state_dict().items() for s in state if _same(part, name, s)
    }
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise FolderError(
            f"{folder}: slot {slot!r} does not fit its component; missing: {_some(missing)};"
            f" unexpected: {_some(unexpected)}"
        )
    return part


def _build_losses(model: XoronModel, registry: Registry | None) -> None:
    """Initialises the parts of losses, which a folder has no weights of."""
    for slot, part in model.parts(Loss).items():
        record = model.composition.slots[slot]
        fresh = build_part(
            registry or installed(),
            slot,
            record,
            space=model.space,
            parts=model.parts(Part),
            seed=0,
        )
        part.load_state_dict(fresh.state_dict())
        part.reset_buffers()


def _prefix(slot: str) -> str:
    return f"slots.{slot.replace('.', '__')}."


def _same(part: nn.Module, name: str, other: str) -> bool:
    state = part.state_dict(keep_vars=True)
    return state[name] is state.get(other)


def _check_plugins(composition: Composition, registry: Registry | None) -> None:
    """Says which packages a folder needs before anything is built."""
    registry = registry or installed()
    installed_names = {plugin.origin.distribution for plugin in registry.plugins}
    for name, slot in composition.slots.items():
        if slot.ref is not None or f"{slot.kind}/{slot.use}" in registry.components(slot.kind):
            continue
        if slot.distribution not in installed_names:
            raise PluginError(
                f"slot {name!r} of this model needs {slot.kind}/{slot.use} of {slot.distribution},"
                f" which is not installed; run: pip install {slot.distribution}"
            )
        registry.component(slot.kind, slot.use)  # raises with the plug-in's state


def local_folder(path: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """The folder at a path, or a fetched one of that name on the Hub.

    Raises:
        FolderError: if there is neither.
    """
    folder = Path(path)
    return folder if folder.is_dir() else _download(str(path), kwargs)


def _download(name: str, kwargs: Mapping[str, Any]) -> Path:
    """A hub name to a local folder; asked for by name, so the network is asked for."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        read_config(name)  # raises: no such folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=kwargs.get("revision")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FolderError(
            f"{name}: is neither a folder nor a model that can be fetched now ({error})"
        ) from None


def _by_slot(state: Mapping[str, Tensor], composition: Composition) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    names = {slot.replace(".", "__"): slot for slot in composition.slots}
    for name, tensor in state.items():
        _, module, _ = name.split(".", 2)
        grouped.setdefault(names[module], {})[name] = tensor
    return grouped


def _link_slot(source: Path | None, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Links the files that hold these tensors and returns their part of the index, or nothing."""
    if source is None or not (source / INDEX).exists():
        return {}
    weight_map = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    found = {name: weight_map[name] for name in tensors if name in weight_map}
    files = set(found.values())
    if len(found) != len(tensors) or not all((source / file).exists() for file in files):
        return {}
    for file in files:
        link(source / file, folder / file)
    return found


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        number = tensor.numel() * tensor.element_size()
        if shards[-1] and size + number > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += number
    return shards


def _carry_over(old: Path, new: Path) -> None:
    """Copies the files of `old` that `write_model` does not write."""
    for item in old.iterdir():
        if item.name in ("slots", INDEX) or item.name.startswith("."):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, new / item.name)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: list[str], limit: int = 5) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
