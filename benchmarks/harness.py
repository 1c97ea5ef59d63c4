"""Compares callables by interleaved paired rounds in one process.

A machine has fast and slow phases (1.6x apart on the shared one that we measured on), so a rate
by itself says little and two runs compared say less. Every round here times every side, in an
order that turns from round to round, and beside them a reference GEMM and a memory read. What is
judged is the median over rounds of the ratio *within* a round; floors say how fast the machine
was.

Footguns: the default clock is the CPU time of this process, so a side that works in
sub-processes needs `children_seconds`; run with one thread (`one_thread`), or CPU seconds add up
over threads; a side must do its whole work in the call (nothing queued, no lazy result).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

Clock = Callable[[], float]
Side = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """What one side took, in absolute terms and against the baseline.

    Attributes:
        seconds: median over rounds, in the clock's seconds.
        ratio: median over rounds of side / baseline; 1.0 for the baseline itself.
        quartiles: the first and third quartile of that ratio.
    """

    seconds: float
    ratio: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """The result of `compare`.

    Attributes:
        baseline: name of the side that the ratios refer to.
        rounds: number of rounds.
        sides: result by side.
        floors: median by floor, in the floor's own unit.
    """

    baseline: str
    rounds: int
    sides: Mapping[str, Comparison]
    floors: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """The report as lines of text."""
        width = max(len(name) for name in (*self.sides, *self.floors))
        lines = [f"{'':{width}}  {'seconds':>10}  {'ratio':>7}  quartiles  ({self.rounds} rounds)"]
        for name, side in self.sides.items():
            low, high = side.quartiles
            lines.append(
                f"{name:{width}}  {side.seconds:10.4f}  {side.ratio:7.3f}  {low:.3f}-{high:.3f}"
            )
        lines += [f"{name:{width}}  {value:10.2f}" for name, value in self.floors.items()]
        return "\n".join(lines)

    def json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def compare(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Clock = time.process_time,
    floors: Mapping[str, Callable[[], float]] | None = None,
) -> Report:
    """Times every side in every round and reports paired ratios to the first side.

    Args:
        sides: name to callable; the first is the baseline.
        rounds: number of measured rounds, at least 1.
        warmup: rounds that are run and thrown away.
        clock: seconds since any fixed point; the differences count.
        floors: name to a callable that measures and returns a machine rate; called every round.

    Raises:
        ValueError: for no side, no round, or a side that takes no measurable time.
    """
    if not sides or rounds < 1 or warmup < 0:
        raise ValueError(
            "expected at least one side, rounds >= 1 and warmup >= 0, "
            f"got {len(sides)} sides, rounds={rounds}, warmup={warmup}"
        )
    names = list(sides)
    floors = floors or {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in floors}
    for index in range(warmup + rounds):
        turn = index % len(names)
        taken = {name: _time(sides[name], clock) for name in names[turn:] + names[:turn]}
        measured = {name: floor() for name, floor in floors.items()}
        if index >= warmup:
            for name, value in taken.items():
                seconds[name].append(value)
            for name, value in measured.items():
                rates[name].append(value)
    if dead := [name for name, values in seconds.items() if min(values) <= 0]:
        raise ValueError(f"{', '.join(dead)}: took no measurable time; make one call do more work")
    base = seconds[names[0]]
    return Report(
        baseline=names[0],
        rounds=rounds,
        sides={name: _against(values, base) for name, values in seconds.items()},
        floors={name: statistics.median(values) for name, values in rates.items()},
    )


def children_seconds() -> float:
    """CPU seconds, user and system, of all finished sub-processes of this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine_floors(
    *, smoke: bool = False, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Callable[[], float]]:
    """A matrix product in GFLOP/s, a memory read and matrix-vector products in GB/s.

    The third is what a kernel library makes of the second: decoding is such products, so their
    rate says how much of a missed bandwidth floor is the library's.

    Args:
        smoke: sizes that take no time and mean nothing.
        device: `cpu` (CPU seconds) or `cuda` (wall seconds, synchronised).
        dtype: of the products.
    """
    import torch

    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    size = 64 if smoke else 1024 if on_cpu else 8192
    kind = getattr(torch, dtype)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    # Four times any last-level cache we met, so that the read goes to memory.
    memory = torch.ones((1 if smoke else 256 if on_cpu else 4096) * 2**20 // 4, device=device)
    shape = (16, 16) if smoke else (2048, 1024)
    matrices = memory.to(kind)[: memory.numel() // (shape[0] * shape[1]) * shape[0] * shape[1]]
    vector = torch.ones(1, shape[1], device=device, dtype=kind)

    def rate(amount: float, side: Side) -> float:
        return amount / 1e9 / max(_time(synchronised(side, device), clock), 1e-9)

    def vectors() -> None:
        for matrix in matrices.view(-1, *shape):
            torch.nn.functional.linear(vector, matrix)

    return {
        f"{dtype} GEMM GFLOP/s": lambda: rate(2 * size**3, lambda: left @ right),
        "memory read GB/s": lambda: rate(memory.nbytes, memory.sum),
        f"{dtype} matrix-vector GB/s": lambda: rate(matrices.nbytes, vectors),
    }


def synchronised(side: Side, device: str) -> Side:
    """A side whose work is done when it returns, on an accelerator too."""
    if device == "cpu":
        return side
    import torch

    def run() -> None:
        side()
        torch.cuda.synchronize()

    return run


def peak_resident_megabytes() -> float:
    """High-water mark of this process's resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; peak memory is measured on Linux only")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options every benchmark takes: `--rounds`, `--json`, `--smoke`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--smoke", action="store_true", help="smallest size: proves that it runs")
    return parser


def say(text: str) -> None:
    """Writes a remark to standard error; results go to standard output."""
    print(text, file=sys.stderr)


def _time(side: Side, clock: Clock) -> float:
    start = clock()
    side()
    return clock() - start


def _against(values: list[float], base: list[float]) -> Comparison:
    ratios = [value / reference for value, reference in zip(values, base, strict=True)]
    if len(ratios) == 1:
        quartiles = (ratios[0], ratios[0])
    else:
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        quartiles = (first, third)
    return Comparison(statistics.median(values), statistics.median(ratios), quartiles)
