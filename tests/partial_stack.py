"""Uses xoron as someone would who installed only the packages named on the command line.

Every other package is hidden from this process, its modules and its metadata alike: what is left
is an installation without it. Then everything that the stack can do is done: compose, save, load,
one training step, generation; what it cannot do has to name the package to install.

    python tests/partial_stack.py llm toy

A package joins by a line in PACKAGES and, if it brings a modality, one in MODALITIES.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

PACKAGES = {
    "llm": "xoron_llm",
    "vision": "xoron_vision",
    "audio": "xoron_audio",
    "train": "xoron_train",
    "toy": "xoron_toy",
}
MEDIA_LIBRARIES = ("torchvision", "torchaudio", "diffusers", "av", "soundfile", "PIL")
# transformers itself imports these where it finds them, so they are hidden like a package.
OFFERED = {"torchvision", "torchaudio", "soundfile", "PIL"}
TEXT = {
    "tokenizer": {"use": "byte"},
    "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
}


@dataclass(frozen=True)
class Modality:
    """What a package brings.

    Attributes:
        name: of the modality.
        alone: slots that work without a backbone.
        more: slots that need one.
        trains: the slot that trains without a backbone, if any.
        makes: whether media come out, too.
        libraries: media libraries that it declares.
    """

    name: str
    alone: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    trains: str | None = None
    makes: bool = False
    libraries: frozenset[str] = frozenset()


MODALITIES = {
    "vision": Modality(
        "image",
        {"encoder": {"use": "siglip", "preset": "tiny"}},
        {"projector": {"use": "perceiver", "preset": "tiny"}},
        libraries=frozenset({"PIL"}),
    ),
    "audio": Modality(
        "audio",
        {"codec": {"use": "rvq-audio", "preset": "tiny"}},
        trains="codec",
        libraries=frozenset({"soundfile"}),
    ),
    "toy": Modality(
        "signal",
        {"codec": {"use": "signal-codec"}, "loss": {"use": "signal-loss", "of": "signal.codec"}},
        {
            name: {"use": f"signal-{name}"}
            for name in ("encoder", "projector", "autoencoder", "generator")
        },
        trains="codec",
        makes=True,
    ),
}


def hide(modules: set[str]) -> None:
    """Makes modules and their distributions absent, as if they were never installed."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            if fullname.partition(".")[0] in modules:
                return None
            return super().find_spec(fullname, path, target)

    find = importlib.metadata.MetadataPathFinder.find_distributions

    def find_distributions(*args: Any, **kwargs: Any) -> Iterator[importlib.metadata.Distribution]:
        for dist in find(*args, **kwargs):
            if re.sub(r"[-.]+", "_", dist.metadata["Name"]) not in modules:
                yield dist

    importlib.metadata.MetadataPathFinder.find_distributions = staticmethod(find_distributions)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder


def command(*arguments: object) -> tuple[int, str]:
    """Runs `xoron`; returns its exit code and what it said on standard error."""
    from xoron_core.cli import run

    logging.getLogger("xoron").handlers.clear()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run([str(argument) for argument in arguments])
    assert "Traceback" not in said.getvalue(), said.getvalue()
    return code, said.getvalue()


def absent(package: str, *arguments: object) -> None:
    """A command that needs a package which is not there says which."""
    code, said = command(*arguments)
    assert code == 2, (arguments, code, said)
    assert f"pip install {package}" in said, said


def step(model: Any, batch: dict[str, Any]) -> float:
    """One step of plain gradient descent; returns the loss before it."""
    import torch

    model.train()
    loss = model(**batch, seed=0).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    model.zero_grad()
    model.eval()
    return float(loss.detach())


def learns(model: Any, batch: dict[str, Any]) -> None:
    """The second loss on one batch is below the first."""
    first, second = step(model, batch), step(model, batch)
    assert second < first, (first, second)


def sample(modality: str, seed: int) -> Any:
    """A made-up medium, as the modality offers it."""
    from xoron_core.descriptors import resolve
    from xoron_core.plugins import registry

    return resolve(registry().modalities()[modality].sample)(seed, 2)


def text_stack(stack: set[str], folder: Path) -> None:
    """A backbone with every modality that is there: text and media, in and out."""
    import xoron_core
    from xoron_core.events import MediaOut

    there = [MODALITIES[name] for name in sorted(stack & set(MODALITIES))]
    slots = {}
    for found in there:
        parts = found.alone | found.more
        slots[found.name] = {name: part for name, part in parts.items() if name != "loss"}
    model, processor = xoron_core.compose({**TEXT, **slots})
    asked: list[dict[str, Any]] = [{"type": "text", "text": "what is this? "}]
    asked += [{"type": m.name, m.name: sample(m.name, 0)} for m in there]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a thing"}]
    learns(model, processor([talk], train=True))
    xoron_core.save(model, processor, folder)
    session = xoron_core.Session(*xoron_core.load(folder))
    assert session.generate([talk[:1]], max_new_tokens=4)[0].tokens >= 1
    for found in there:
        if found.makes:
            draw = [[{"role": "user", "content": "draw"}]]
            events = session.stream(draw, begin_with=found.name, max_new_tokens=24)
            assert any(isinstance(event, MediaOut) for event in events), found.name


def media_stack(package: str, folder: Path) -> None:
    """A modality without any language model: runs, trains, saves, and says what text needs."""
    import torch

    import xoron_core

    found = MODALITIES[package]
    model, processor = xoron_core.compose({found.name: found.alone})
    slot = f"{found.name}.{found.trains or 'encoder'}"
    media = processor.media_batch(slot, [sample(found.name, seed) for seed in range(3)])
    if found.trains is not None:
        learns(model, {"media": {slot: media}})
    xoron_core.save(model, processor, folder)
    loaded, _ = xoron_core.load(folder)
    with torch.no_grad():
        if found.trains == "codec":
            codes = loaded.call(slot, "encode", **media)
            loaded.call(slot, "decode", codes.ids, codes.metadata)
        else:
            ours, theirs = (m.part(slot)(**media).values for m in (model, loaded))
            assert torch.equal(ours, theirs)
    absent("xoron-llm", "generate", folder, "hello")


def train_command(folder: Path, work: Path) -> None:
    """Two steps of `xoron train` on a file of its own."""
    (work / "corpus").mkdir()
    for number in range(12):
        (work / "corpus" / f"{number}.txt").write_text(f"line {number} of the corpus\n" * 9)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        f"name: two-steps\nmixture: {{own: {{kind: files, path: {work}/corpus}}}}\n"
        "eval_fraction: 0.2\nsequence_length: 32\nbatch_size: 2\nmax_steps: 2\n"
        "learning_rate: 0.01\ntensorboard: false\n"
    )
    code, said = command("-q", "train", recipe, "--model", folder, "-o", work / "run")
    assert code == 0, said


def main() -> None:
    """Hides what is not named, then uses the rest."""
    stack = set(sys.argv[1:])
    unknown = stack - set(PACKAGES)
    assert not unknown, f"unknown packages {sorted(unknown)}; expected some of {sorted(PACKAGES)}"
    needed = set().union(*(MODALITIES[name].libraries for name in stack & set(MODALITIES)))
    hide({PACKAGES[name] for name in set(PACKAGES) - stack} | (OFFERED - needed))
    from xoron_core.plugins import registry

    states = {plugin.name: plugin.state for plugin in registry().plugins}
    assert states == dict.fromkeys({"core", *stack}, "available"), states
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        if "llm" in stack:
            text_stack(stack, folder)
        else:
            if not registry().preset_names():
                absent("xoron-llm", "compose", "--preset", "tiny", "-o", folder)
                assert not folder.exists()
            for package in sorted(stack & set(MODALITIES)):
                media_stack(package, Path(work) / package)
        if "train" not in stack:
            absent("xoron-train", "train", "text-tiny", "-o", Path(work) / "run")
        elif "llm" in stack:
            train_command(folder, Path(work))
    print("pulled:", *sorted((set(MEDIA_LIBRARIES) & set(sys.modules)) - needed))


if __name__ == "__main__":
    main()
