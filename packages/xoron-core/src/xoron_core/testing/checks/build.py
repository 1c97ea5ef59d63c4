"""Components build, on the CPU and on the meta device, run, and load what they saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xoron_core.components import Part
from xoron_core.descriptors import KINDS
from xoron_core.testing.catalogue import NEURAL, check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import Named, difference, named, not_finite

LAID_OUT = ((1, 1), (2, 2))


@check(
    "build",
    KINDS,
    since=1,
    summary="it builds from its config between its neighbours",
    needs=("references", "config-default"),
)
def build(subject: Subject) -> None:
    part = subject.build()
    if isinstance(part, nn.Module) and not hasattr(part, "config"):
        raise CheckFailed(
            f"{subject.component.factory}.__init__ does not call super().__init__(config, context)"
        )


@check(
    "runs",
    NEURAL,
    since=1,
    summary="it runs on a batch, ends within the time limit and gives finite results",
    needs=("build",),
)
def runs(subject: Subject) -> None:
    feed = driver(subject)
    with torch.no_grad():
        found = feed.everything(subject.build(), feed.batch([(1, 1), (2, 1)]))
    if off := not_finite(found):
        raise CheckFailed(f"{subject.component.factory}: {off}")


@check(
    "build-meta",
    NEURAL,
    since=1,
    summary="it builds on the meta device, as plans do",
    needs=("build",),
)
def build_meta(subject: Subject) -> None:
    with torch.device("meta"):
        part = subject.build()
    real = subject.build()
    shapes = [[tuple(tensor.shape) for tensor in _tensors(p).values()] for p in (part, real)]
    if shapes[0] != shapes[1]:
        raise CheckFailed(
            f"{subject.component.factory}.__init__ builds tensors of shapes {shapes[0]} on the meta"
            f" device and {shapes[1]} on the CPU; they may depend on config and context alone"
        )
    for name, tensor in _tensors(part).items():
        if tensor.device.type != "meta":
            raise CheckFailed(
                f"{subject.component.factory}.__init__ puts {name} on {tensor.device} though the"
                " current device is meta; create tensors without `device`"
            )


@check(
    "state-names",
    NEURAL,
    since=1,
    summary="the same config gives the same names of parameters and buffers, before and after use",
)
def state_names(subject: Subject) -> None:
    part, other = subject.build(0), subject.build(1)
    first = list(part.state_dict())
    if first != list(other.state_dict()):
        changed = sorted(set(first) ^ set(other.state_dict()))
        raise CheckFailed(
            f"{subject.component.factory}: two instances of one config name their state"
            f" differently: {', '.join(changed[:4])}; names must follow from the config alone"
        )
    feed = driver(subject)
    with torch.no_grad():
        feed.outputs(part, feed.batch([(1, 1)]))
    if first != list(part.state_dict()):
        changed = sorted(set(first) ^ set(part.state_dict()))
        raise CheckFailed(
            f"{subject.component.factory}: a forward pass adds or removes {', '.join(changed[:4])};"
            " create all parameters in __init__, or a folder saved before cannot be loaded"
        )


@check(
    "save-load",
    NEURAL,
    since=1,
    summary="weights loaded into an uninitialised instance give bit-equal outputs",
    needs=("runs", "build-meta", "state-names", "global-rng"),
)
def save_load(subject: Subject) -> None:
    feed = driver(subject)
    saved = subject.build(0)
    batch = feed.batch(LAID_OUT)
    with torch.no_grad():
        expected = feed.everything(saved, batch)
        loaded = load_into_rubble(subject, saved)
        got = feed.everything(loaded, batch)
    if off := difference(expected, got):
        raise CheckFailed(
            f"{subject.component.factory}: loaded from its state_dict it answers otherwise: {off}."
            " What is computed in __init__ and not saved must be recomputed in reset_buffers()"
        )


def load_into_rubble(subject: Subject, saved: Part) -> Part:
    """An instance as `from_pretrained` makes it: built on meta, loaded, buffers reset."""
    rubble = subject.build(1)
    for buffer in _unsaved(rubble):
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
        else:
            buffer.zero_()
    rubble.load_state_dict({name: tensor.clone() for name, tensor in saved.state_dict().items()})
    rubble.reset_buffers()
    return rubble.eval()


def _unsaved(part: nn.Module) -> list[Tensor]:
    saved = part.state_dict()
    return [buffer for name, buffer in part.named_buffers() if name not in saved]


def _tensors(part: nn.Module) -> Named:
    return named({**dict(part.named_parameters()), **dict(part.named_buffers())})
