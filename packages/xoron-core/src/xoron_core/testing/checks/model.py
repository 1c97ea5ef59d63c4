"""The parts in a whole model: composed with an installed backbone, they are seen, train and answer.

Footgun: a codec's media are generated only where they are short (`frame_limits`), since random
weights end them late.
"""

from __future__ import annotations

from typing import Any

import torch

from xoron_core.components import Codec
from xoron_core.composer.composition import read_composition
from xoron_core.descriptors import Component, Modality, resolve
from xoron_core.events import MediaOut
from xoron_core.testing.catalogue import MODEL, check
from xoron_core.testing.outcome import NEEDS, CheckFailed, CheckSkipped
from xoron_core.testing.target import Target

GENERATED_IDS = 64


@check(
    "composes",
    MODEL,
    since=1,
    summary="its parts compose with an installed backbone: seen, trained, generated with",
    needs=(),
)
def composes(target: Target) -> None:
    if any(isinstance(outcome, CheckFailed) for outcome in target.memo.values()):
        raise CheckSkipped(f"{NEEDS} all other checks, of which some did not pass")
    own = target.plugin.contribution.components
    modalities = target.registry.modalities()
    used = dict.fromkeys(c.modality for c in own if c.modality in modalities)
    if not (ready := [modalities[name] for name in used if modalities[name].sample]):
        raise CheckSkipped("it has no component of a modality that declares a `sample`")
    text = {kind: _use(target, kind, "text") for kind in ("tokenizer", "backbone")}
    if not all(text.values()):
        raise CheckSkipped("no plug-in offers a tokenizer and a backbone; pip install xoron-llm")
    for modality in ready:
        _compose(target, modality, text)


def _compose(target: Target, modality: Modality, text: dict[str, Any]) -> None:
    # Both import transformers, which takes longer than all other checks.
    from xoron_core.api import build
    from xoron_core.composer.planner import plan

    slots = {
        kind: used
        for kind in ("encoder", "projector", "codec", "autoencoder", "generator")
        if (used := _use(target, kind, modality.name))
    }
    if not {"encoder", "projector"} <= set(slots):
        slots = {kind: used for kind, used in slots.items() if kind not in ("encoder", "projector")}
    if not slots:
        raise CheckSkipped(f"modality {modality.name!r} has no part that a sequence can hold")
    # The default token groups: what its media need beyond them, its components must name.
    data = {"name": "conformance", **text, modality.name: slots}
    composition = read_composition(target.registry, data=data)
    model, processor = build(plan(composition, target.registry), target.registry)
    if {"encoder", "codec"} & set(slots):
        _check_input(model, processor, modality)
    if "generator" in slots or _is_short(model, modality):
        _check_output(model, processor, modality)


def _check_input(model: Any, processor: Any, modality: Modality) -> None:
    talks = [_talk(modality, seed) for seed in (1, 2)]
    with torch.no_grad():
        first, other = (model(**processor(talk[:1])).logits[:, -1] for talk in talks)
    if torch.equal(first, other):
        raise CheckFailed(
            f"composed with a backbone, two different {modality.name} media give the same logits;"
            " what the encoder or codec makes of them does not reach the sequence"
        )
    model.train()
    loss = model(**processor(talks, train=True)).loss
    if not torch.isfinite(loss):
        raise CheckFailed(f"composed with a backbone, the training loss is {loss.item()}")
    loss.backward()
    for kind in ("encoder", "projector"):
        part = model.slots.get(f"{modality.name}.{kind}")
        trainable = [p for p in part.parameters() if p.requires_grad] if part is not None else []
        if trainable and not any(p.grad is not None and p.grad.any() for p in trainable):
            raise CheckFailed(
                f"composed with a backbone, no gradient reaches {modality.name}.{kind}"
            )
    model.eval()


def _check_output(model: Any, processor: Any, modality: Modality) -> None:
    from xoron_core.session import Session

    session = Session(model, processor)
    ask = [{"role": "user", "content": "go on"}]
    events = session.stream(ask, begin_with=modality.name, max_new_tokens=GENERATED_IDS)
    if not any(isinstance(event, MediaOut) for event in events):
        raise CheckFailed(
            f"composed with a backbone, a session that begins a {modality.name} makes none"
        )


def _is_short(model: Any, modality: Modality) -> bool:
    codec = model.slots.get(f"{modality.name}.codec")
    if not isinstance(codec, Codec) or codec.needs_metadata(codec.config):
        return False
    return codec.frame_limits(codec.config)[1] * len(codec.ranges(codec.config)) <= GENERATED_IDS


def _talk(modality: Modality, seed: int) -> list[dict[str, Any]]:
    kind = modality.content_types[0]
    medium = {"type": kind, kind: resolve(modality.sample)(seed, 2)}
    ask = [{"type": "text", "text": "what is this? "}, medium]
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": "this"}]


def _use(target: Target, kind: str, modality: str) -> dict[str, str] | None:
    """How a composition names the component of a kind and modality, the plug-in's own first."""
    every: list[Component] = [
        *target.plugin.contribution.components,
        *target.registry.components(kind).values(),
    ]
    found = next((c for c in every if c.kind == kind and c.modality == modality), None)
    if found is None:
        return None
    tiny = {"preset": "tiny"} if target.registry.presets("tiny", found.key) else {}
    return {"use": found.key, **tiny}
