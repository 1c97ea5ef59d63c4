"""Runs each attention and expert kernel on a tiny input and compares it with a plain formula.

A kernel that this machine or torch build lacks is a note; one that gives wrong numbers, or the two
that everything falls back to (SDPA's math kernel and the expert slices) failing, is wrong. Flex
attention and torch.compile take up to a minute the first time and run on request.

Shapes: B rows, H heads, N positions, d per head; T tokens, D width, E experts.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xoron_core.descriptors import resolve
from xoron_core.doctor.finding import Finding
from xoron_core.nn.experts import Kernel, run_experts
from xoron_core.nn.mlp import SwiGLU

_SDPA = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
_REQUIRED = ("sdpa math", "experts slices")
_REINSTALL = "install torch again: pip install --force-reinstall torch"
_CANNOT = (ImportError, OSError, RuntimeError, ValueError)


def examine_kernels(*, compiled: bool = False) -> Iterator[Finding]:
    """What runs here.

    Args:
        compiled: also run flex attention and torch.compile.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        qkv = torch.randn(3, 1, 2, 128, 16, device=device).to(dtype).unbind()
        where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        for name, backend in _SDPA.items():
            yield _compare(name, where, partial(_sdpa, backend, *qkv), _attention(*qkv))
        if _is_installed("flash-attn"):
            yield _compare("flash-attn", where, partial(_flash_attn, *qkv), _attention(*qkv))
        else:
            yield Finding("kernel", "flash-attn", "note", "not installed")
        yield from _experts(device, where)
    yield _toolchain(device)
    if compiled:
        yield _compare("flex attention", where, partial(_flex, *qkv), _attention(*qkv))
        x = qkv[0].float()
        run = torch.compile(lambda x: (x.sin() + 1).sum(-1))
        yield _compare("torch.compile", where, lambda: run(x), (x.sin() + 1).sum(-1))


def _compare(name: str, where: str, run: Callable[[], Tensor], expected: Tensor) -> Finding:
    """Runs a kernel and compares its result, relative to the largest expected number."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length why a kernel is not there
            found = run()
    except _CANNOT as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        if name in _REQUIRED:
            return Finding("kernel", name, "wrong", f"fails: {reason}", _REINSTALL)
        return Finding("kernel", name, "note", f"not usable here ({where}): {reason}")
    half = found.dtype in (torch.bfloat16, torch.float16)
    off = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not off <= (2e-2 if half else 1e-4):  # also where it is not a number
        detail = f"gives wrong numbers ({where}): off by {off:.1e} of the largest"
        return Finding("kernel", name, "wrong", detail, _REINSTALL)
    return Finding("kernel", name, "ok", f"runs ({where})")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, d): causal attention as the formula says it, in fp32."""
    q, k, v = q.float(), k.float(), v.float()
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    run = resolve("flash_attn:flash_attn_func")
    out: Tensor = run(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
    return out.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def causal(score: Tensor, _b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query >= key, score, -float("inf"))

    return torch.compile(flex_attention)(q, k, v, score_mod=causal)


def _experts(device: torch.device, where: str) -> Iterator[Finding]:
    """Both ways of running experts against every expert on every token."""
    experts = nn.ModuleList(SwiGLU(16, 32) for _ in range(4)).to(device)
    tokens = torch.randn(12, 16, device=device)
    weights = torch.rand(12, 2, device=device)
    chosen = torch.rand(12, 4, device=device).argsort(-1)[:, :2]
    shares = torch.zeros(12, 4, device=device).scatter(1, chosen, weights)
    expected = sum(expert(tokens) * shares[:, i : i + 1] for i, expert in enumerate(experts))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    experts.to(dtype)
    for kernel in ("slices", "grouped"):

        def run(kernel: str = kernel) -> Tensor:
            return run_experts(
                experts,
                tokens.to(dtype),
                weights=weights,
                chosen=chosen,
                kernel=cast(Kernel, kernel),
            )

        yield _compare(f"experts {kernel}", where, run, cast(Tensor, expected))


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _toolchain(device: torch.device) -> Finding:
    """Whether torch.compile finds what it compiles with."""
    if device.type == "cuda":
        return _tool(_is_installed("triton"), "triton", "pip install triton brings it")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is not None and not header.is_file():
        return _tool(False, "", f"no {header}; install Python's development files")
    return _tool(compiler is not None, compiler or "", "no C++ compiler found; install one")


def _tool(there: bool, what: str, absent: str) -> Finding:
    if there:
        return Finding("kernel", "compile toolchain", "ok", what)
    return Finding("kernel", "compile toolchain", "note", f"absent ({absent}); models run eagerly")
