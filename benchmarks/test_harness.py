"""Proves that the harness reports what a drifting machine would hide, and refuses empty work."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

from benchmarks.harness import children_seconds, compare, machine_floors, one_thread


class Machine:
    """A clock that work moves on; the machine is slower by `phase` from round to round."""

    def __init__(self, phases: list[float]) -> None:
        self.now = 0.0
        self.phases = phases
        self.calls = 0

    def clock(self) -> float:
        return self.now

    def side(self, cost: float, sides: int = 2):
        def run() -> None:
            self.now += cost * self.phases[self.calls // sides % len(self.phases)]
            self.calls += 1

        return run


def test_paired_ratio_is_exact_on_a_machine_that_drifts() -> None:
    machine = Machine([1.0, 1.6, 0.7, 2.5, 1.1])
    report = compare(
        {"base": machine.side(1.0), "slow": machine.side(3.0)},
        rounds=5,
        warmup=0,
        clock=machine.clock,
    )
    assert report.baseline == "base"
    assert report.sides["base"].ratio == 1.0
    assert report.sides["slow"].ratio == pytest.approx(3.0)
    assert report.sides["slow"].quartiles == pytest.approx((3.0, 3.0))
    assert report.sides["slow"].seconds == pytest.approx(3.0 * statistics.median(machine.phases))


def test_warm_up_rounds_are_not_counted() -> None:
    machine = Machine([1000.0, 1.0, 1.0])
    report = compare({"only": machine.side(2.0, sides=1)}, rounds=2, clock=machine.clock)
    assert report.sides["only"].seconds == 2.0


def test_the_order_turns_so_that_no_side_always_runs_first() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    compare(sides, rounds=3, warmup=0, clock=lambda: float(next(ticks)))
    assert "".join(order) == "abcbcacab"


def test_floors_are_measured_in_every_round() -> None:
    values = iter([99.0, 1.0, 5.0, 3.0])
    machine = Machine([1.0])
    report = compare(
        {"only": machine.side(1.0)},
        rounds=3,
        clock=machine.clock,
        floors={"rate": lambda: next(values)},
    )
    assert report.floors == {"rate": 3.0}
    assert json.loads(report.json())["floors"] == {"rate": 3.0}


@pytest.mark.parametrize(("sides", "rounds", "warmup"), [(1, 0, 0), (1, 1, -1), (0, 1, 0)])
def test_nothing_to_measure_is_refused(sides: int, rounds: int, warmup: int) -> None:
    names = {"only": lambda: None} if sides else {}
    with pytest.raises(ValueError, match=f"got {sides} sides, rounds={rounds}, warmup={warmup}"):
        compare(names, rounds=rounds, warmup=warmup)


def test_a_side_without_measurable_time_is_refused() -> None:
    with pytest.raises(ValueError, match="idle: took no measurable time"):
        compare({"idle": lambda: None}, rounds=1, clock=lambda: 0.0)


def test_children_seconds_sees_the_work_of_a_sub_process() -> None:
    before = children_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert children_seconds() - before > 0.01


def test_machine_floors_are_positive_rates_and_one_thread_is_undone() -> None:
    import torch

    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
        rates = {name: floor() for name, floor in machine_floors(smoke=True).items()}
    assert torch.get_num_threads() == before
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates.values())
