"""Which package brings what, so that a missing part answers with the `pip install` line.

Only our own packages stand here: a third party's plug-in cannot be known before it is installed.
"""

from __future__ import annotations

from collections.abc import Iterable

_PACKAGES = ("core", "llm", "vision", "video", "audio", "gen", "train", "synth", "export")
_COMPONENTS = {
    "backbone/xoron-moe": "xoron-llm",
    "backbone/hf": "xoron-llm",
    "tokenizer/byte": "xoron-llm",
    "tokenizer/qwen2.5": "xoron-llm",
    "fusion/cross-attention": "xoron-llm",
    "encoder/siglip": "xoron-vision",
    "encoder/xoron-vision": "xoron-vision",
    "projector/mlp": "xoron-vision",
    "projector/pixel-shuffle": "xoron-vision",
    "projector/spatial": "xoron-vision",
    "projector/c-abstractor": "xoron-vision",
    "projector/perceiver": "xoron-vision",
    "projector/perceiver-mlp": "xoron-vision",
    "codec/titok-fsq": "xoron-vision",
    "autoencoder/kl-image": "xoron-vision",
    "autoencoder/diffusers-image": "xoron-vision",
    "loss/perceptual": "xoron-vision",
    "loss/patch-gan": "xoron-vision",
    "autoencoder/vidtok": "xoron-video",
    "codec/rvq-audio": "xoron-audio",
    "codec/hf-audio": "xoron-audio",
    "generator/moe-dit": "xoron-gen",
}
_SLOTS = {
    "backbone": "xoron-llm",
    "tokenizer": "xoron-llm",
    "fusion": "xoron-llm",
    "image.encoder": "xoron-vision",
    "image.projector": "xoron-vision",
    "image.codec": "xoron-vision",
    "image.autoencoder": "xoron-vision",
    "image.generator": "xoron-gen",
    "video.encoder": "xoron-video",
    "video.generator": "xoron-gen",
    "audio.encoder": "xoron-audio",
    "audio.codec": "xoron-audio",
}
_COMMANDS = {
    "train": "xoron-train",
    "gate": "xoron-train",
    "tokens build": "xoron-train",
    "tokens audit": "xoron-train",
    "tokens migrate-shards": "xoron-train",
    "synth": "xoron-synth",
    "export": "xoron-export",
}


def install_plugin(name: str) -> str | None:
    """Returns the package of one of our plug-ins."""
    return f"xoron-{name}" if name in _PACKAGES else None


def install_component(key: str) -> str | None:
    """Returns the package of one of our components, by `kind/name`."""
    return _COMPONENTS.get(key)


def install_slot(slot: str) -> str | None:
    """Returns the package that usually fills a slot."""
    return _SLOTS.get(slot)


def empty_slot(slot: str, filled: Iterable[str]) -> str:
    """Says that a model has nothing in a slot, what it has, and what to install."""
    package = install_slot(slot)
    install = f"; run: pip install {package}, then compose it in" if package else ""
    return f"this model has nothing in slot {slot!r} (it has: {', '.join(filled)}){install}"


def install_command(name: str) -> str | None:
    """Returns the package that brings a sub-command."""
    return _COMMANDS.get(name)
