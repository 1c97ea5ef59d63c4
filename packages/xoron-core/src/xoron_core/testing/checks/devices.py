"""Devices and precisions: components go where they are put, and stay finite in half precision.

A machine without an accelerator stands in for one with the meta device: a tensor that forward makes
on a fixed device meets meta tensors there as it would meet CUDA ones.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from xoron_core.testing.catalogue import NEURAL, check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import cast, difference, named, not_finite

# What the kernels say of tensors on two devices, and of an accelerator that is not there.
_MIXED = ("expected device", "same device", "different from other tensors", "not compiled with")
_ACCELERATORS = ("cuda", "mps", "xpu", "npu", "hpu")


@check(
    "no-hard-coded-device",
    NEURAL,
    since=1,
    summary="no tensor is made on a fixed device",
    needs=("runs", "build-meta"),
)
def no_hard_coded_device(subject: Subject) -> None:
    for cls in _own_classes(subject):
        for line, text in _device_literals(cls):
            raise CheckFailed(
                f"{cls.__module__}.{cls.__name__}, line {line}: {text} names a device; use that of"
                " an input or a parameter"
            )
    feed = driver(subject)
    batch = cast(feed.batch([(1, 2)]), "meta")
    with torch.device("meta"):
        part = subject.build()
    try:
        with torch.no_grad():
            found = feed.outputs(part, batch)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError) as error:
        if any(words in str(error) for words in _MIXED):
            raise CheckFailed(
                f"{subject.component.factory}: with inputs and weights on another device it fails:"
                f" {error}; make tensors with `device=` of an input"
            ) from error
        return  # reads values, which the meta device has not: no device is wrong up to here
    for name, value in found.items():
        if value.device.type != "meta":
            raise CheckFailed(
                f"{subject.component.factory}: {name} comes out on {value.device} for inputs and"
                " weights on another device; make tensors with `device=` of an input"
            )


@check("device-move", NEURAL, since=1, summary="`.to(device)` moves every tensor it computes with")
def device_move(subject: Subject) -> None:
    part = subject.build()
    for path, module in part.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") and attribute in vars(nn.Module()):
                continue
            if any(not tensor.is_meta for tensor in _loose(value)):
                where = f"{path}.{attribute}" if path else attribute
                raise CheckFailed(
                    f"{subject.component.factory}: {where} holds a tensor that is neither parameter"
                    " nor buffer, so .to() leaves it behind; use self.register_buffer"
                )
    if not torch.cuda.is_available():
        return
    feed = driver(subject)
    batch = feed.batch([(1, 1), (2, 1)])
    with torch.no_grad():
        expected = feed.outputs(part, batch)
        there = feed.outputs(part.to("cuda"), cast(batch, "cuda"))
        back = feed.outputs(part.to("cpu"), batch)
    if off := difference(expected, cast(there, "cpu"), 1e-2) or difference(expected, back):
        raise CheckFailed(f"{subject.component.factory}: moved to CUDA and back, {off}")


@check(
    "half-precision",
    NEURAL,
    since=1,
    summary="outputs in bfloat16 and float16 are finite (`keep_fp32` parts stay in float32)",
)
def half_precision(subject: Subject) -> None:
    feed = driver(subject)
    batch = feed.batch([(1, 1), (2, 2)] if feed.varies else [(1, 1), (2, 1)])
    for dtype in (torch.bfloat16, torch.float16):
        part = subject.build(dtype=dtype)
        try:
            with torch.no_grad():
                found = feed.everything(part, cast(batch, dtype))
        except RuntimeError as error:
            raise CheckFailed(
                f"{subject.component.factory} in {dtype}: {error}; make tensors in the dtype of an"
                " input, and cast where `keep_fp32` parts begin and end"
            ) from error
        if off := not_finite(found):
            raise CheckFailed(
                f"{subject.component.factory} in {dtype}: {off}; scale before products, take"
                " statistics in float32, or name the sub-module in keep_fp32"
            )


def _own_classes(subject: Subject) -> list[type]:
    """The classes of its sub-modules that its own package defines."""
    package = subject.cls.__module__.partition(".")[0]
    with torch.device("meta"):
        part = subject.build()
    classes = dict.fromkeys(type(module) for module in part.modules())
    bases = dict.fromkeys(base for cls in classes for base in cls.__mro__)
    return [cls for cls in bases if cls.__module__.partition(".")[0] == package]


def _device_literals(cls: type) -> list[tuple[int, str]]:
    """Places in a class that call with the name of an accelerator, or ask for one by method."""
    try:
        source, first = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return []
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent("".join(source)))):
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        names = [g.value for g in given if isinstance(g, ast.Constant) and isinstance(g.value, str)]
        if method in _ACCELERATORS or any(n.partition(":")[0] in _ACCELERATORS for n in names):
            found.append((first + node.lineno - 1, ast.unparse(node)[:60]))
    return found


def _loose(value: Any) -> list[Tensor]:
    """Tensors that a plain attribute holds; modules move by themselves or belong to others."""
    if isinstance(value, nn.Module | nn.Parameter):
        return []
    if isinstance(value, Tensor):
        return [value]
    return list(named(value).values()) if isinstance(value, dict | list | tuple) else []
