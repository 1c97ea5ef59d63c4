"""Head and loss over a full vocabulary, blockwise attention, and a ring of two processes.

Four comparisons, each against what its promise names, all on one thread per process:
- head + loss (forward and backward) beside a GEMM of the same 6 P D V floating-point operations,
  and the plain way (`F.cross_entropy` on all logits); ratios are to the GEMM;
- their peak memory beyond the inputs, each in a process of its own;
- blockwise attention beside torch's flash kernel in one piece;
- ring attention over two processes beside the same blocks without any exchange, in CPU seconds;
  and what share of the wall time a process waits. Waiting grows with anything else that runs here.

    hatch run bench attention_and_loss

Shapes: P positions, D width, V vocabulary rows, H heads, N sequence length, d per head.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Report,
    arguments,
    compare,
    machine_floors,
    one_thread,
    peak_resident_megabytes,
)
from xoron_core.nn import ring
from xoron_core.nn.blockwise import blockwise_attention
from xoron_core.nn.linear_loss import linear_cross_entropy

GEMM = "GEMM of equal FLOPs"
PLAIN, CHUNKED = "plain cross-entropy", "chunked"
FLASH, BLOCKWISE = "flash in one piece", "blockwise"
ALONE, RING = "the same blocks alone", "ring"


def head_inputs(positions: int, width: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (P, D), a head's weight (V, D) and targets (P,)."""
    torch.manual_seed(0)
    weight = torch.empty(rows, width).normal_(std=0.02).requires_grad_()
    hidden = torch.randn(positions, width, requires_grad=True)
    return hidden, weight, torch.randint(0, rows, (positions,))


def head_step(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Forward and backward of head and mean loss; gradients are thrown away."""
    if way == CHUNKED:
        total = linear_cross_entropy(hidden, weight, targets=targets).sum
    else:
        total = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    (total / len(targets)).backward()
    hidden.grad = weight.grad = None


def head_time(positions: int, width: int, rows: int, *, rounds: int, smoke: bool) -> Report:
    """Head + loss in time."""
    inputs = head_inputs(positions, width, rows)
    size = 32 if smoke else 1024
    left, right = torch.randn(size, size), torch.randn(size, size)
    products = max(1, round(6 * positions * width * rows / (2 * size**3)))

    def gemm() -> None:
        for _ in range(products):
            left @ right

    return compare(
        {
            GEMM: gemm,
            PLAIN: lambda: head_step(PLAIN, *inputs),
            CHUNKED: lambda: head_step(CHUNKED, *inputs),
        },
        rounds=rounds,
        floors=machine_floors(smoke=smoke),
    )


def peak_megabytes(way: str, positions: int, width: int, rows: int) -> float:
    """Peak resident memory of one step beyond its inputs; call it in a fresh process (Linux)."""
    torch.set_num_threads(1)
    inputs = head_inputs(positions, width, rows)
    head_step(way, *head_inputs(8, 8, 64))  # what the first call loads is no part of the step
    before = peak_resident_megabytes()
    head_step(way, *inputs)
    return peak_resident_megabytes() - before


def head_memory(positions: int, width: int, rows: int) -> dict[str, float]:
    """Peak megabytes by way."""
    peaks = {}
    for way in (PLAIN, CHUNKED):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[way] = pool.submit(peak_megabytes, way, positions, width, rows).result()
    return peaks


def attention_time(heads: int, length: int, width: int, *, rounds: int) -> dict[str, Report]:
    """Causal attention, forward alone and with backward."""
    q, k, v = (torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3))
    # A smoke run is shorter than a default chunk, and would compare the kernel with itself.
    chunk = min(4096, length // 2)
    ways: dict[str, Callable[[], Tensor]] = {
        FLASH: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        BLOCKWISE: lambda: blockwise_attention(q, k, v, chunk=chunk),
    }

    def forward(way: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            way()

    def both(way: Callable[[], Tensor]) -> None:
        torch.autograd.grad(way().sum(), (q, k, v))

    return {
        f"attention {length}, {name}": compare(
            {side: partial(run, way) for side, way in ways.items()}, rounds=rounds
        )
        for name, run in (("forward", forward), ("forward and backward", both))
    }


def ring_worker(rank: int, folder: str, heads: int, length: int, width: int, rounds: int) -> None:
    """One of two processes; writes its report and its share of waiting to `folder`."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    shape = (1, heads, length // 2, width)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    waits: list[float] = []
    steps: list[float] = []
    wait = ring._Exchange.wait

    def timed_wait(exchange: Any) -> Tensor:
        start = time.perf_counter()
        received = wait(exchange)
        waits[-1] += time.perf_counter() - start
        return received

    def step() -> None:
        dist.barrier()  # or the first wait would be for the other process to begin
        waits.append(0.0)
        start = time.perf_counter()
        with mock.patch.object(ring._Exchange, "wait", timed_wait):
            torch.autograd.grad(ring.ring_attention(q, k, v).sum(), (q, k, v))
        steps.append(time.perf_counter() - start)

    def alone() -> None:
        def stay(self: Any, tensor: Tensor, tag: int) -> Any:
            return ring._Exchange(tensor, tensor, [])

        with mock.patch.object(ring._Ring, "start", stay):
            torch.autograd.grad(ring.ring_attention(q, k, v).sum(), (q, k, v))

    report = compare({ALONE: alone, RING: step}, rounds=rounds)
    # Without the first step, which opens the connections.
    told = {**asdict(report), "waiting": sum(waits[1:]) / sum(steps[1:])}
    Path(folder, f"rank-{rank}").write_text(json.dumps(told))
    dist.destroy_process_group()


def ring_time(heads: int, length: int, width: int, *, rounds: int) -> list[dict[str, Any]]:
    """The result of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            ring_worker, args=(folder, heads, length, width, rounds), nprocs=2
        )
        return [json.loads(Path(folder, f"rank-{rank}").read_text()) for rank in range(2)]


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(__doc__.splitlines()[0], rounds=5).parse_args()
    smoke, rounds = options.smoke, 1 if options.smoke else options.rounds
    sizes = [(16, 16, 512)] if smoke else [(512, 1024, 151_936), (2048, 1024, 151_936)]
    shape = (2, 256, 16) if smoke else (4, 8192, 64)
    reports, memory = {}, {}
    for size in sizes:
        name = "head + loss, P {}, D {}, V {}".format(*size)
        memory[name] = head_memory(*size)
    with one_thread():
        for size, name in zip(sizes, memory, strict=True):
            share = max(1, rounds * sizes[0][0] // size[0])  # long steps, fewer rounds
            reports[name] = head_time(*size, rounds=share, smoke=smoke)
        reports.update(attention_time(*shape, rounds=rounds))
    ranks = ring_time(*shape, rounds=rounds)
    if options.json:
        told = {name: asdict(report) for name, report in reports.items()}
        print(json.dumps({"time": told, "peak megabytes": memory, "ring": ranks}, indent=2))
        return 0
    for name, report in reports.items():
        print(f"\n{name}\n{report.table()}")
        if name in memory:
            plain, chunked = memory[name][PLAIN], memory[name][CHUNKED]
            share_of = f"{chunked / plain:.3f}" if plain > 0 else "not measurable"
            print(f"peak memory: plain {plain:.0f} MB, chunked {chunked:.0f} MB, ratio {share_of}")
    print(f"\nring of two processes, forward and backward, (H, N, d) = {shape}")
    for rank, told_rank in enumerate(ranks):
        ratio = told_rank["sides"][RING]["ratio"]
        print(f"rank {rank}: {ratio:.3f} x the CPU seconds of {ALONE}", end=", ")
        print(f"waiting {told_rank['waiting']:.1%} of the wall time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
