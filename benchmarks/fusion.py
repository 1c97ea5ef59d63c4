"""What the cross-attention fusion adds: to a decoding step, and to training on text alone.

Two comparisons at the `xoron-dev` size (a small vocabulary), on one thread, fp32:
- a step over 512 cached positions without media, with S features in sight whose keys and values are
  kept (what the model does), and with keys and values made anew at each step;
- a training step of 1 x 512 bytes of text at a quarter of the layers and adapters, the fusion
  frozen (it is not called) and trained (it runs on a feature that nobody sees, so that processes
  with and without media have the same gradients).

    hatch run bench fusion

Shapes: S features in sight.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

import xoron_core
from benchmarks.harness import Report, arguments, compare, one_thread
from xoron_core import media_memory
from xoron_core.media_memory import MediaMemory
from xoron_core.model import XoronModel

NONE, KEPT, ANEW = "no media", "keys and values kept", "keys and values made anew"
FROZEN, TRAINED = "fusion frozen", "fusion trained"


def compose(adapters: int, *, smoke: bool) -> XoronModel:
    """A text model with one adapter to three layers, whose output projections are not zero."""
    preset = {"preset": "tiny"} if smoke else {"preset": "xoron-dev", "num_layers": 3 * adapters}
    model, _ = xoron_core.compose(
        {
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", **preset},
            "fusion": {"use": "cross-attention", "num_layers": adapters},
        },
        plugins=["llm"],
    )
    for parameter in model.part("fusion").parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def decode_time(model: XoronModel, features: int, *, past: int, rounds: int) -> Report:
    """One step, three ways."""
    fusion, device = model.part("fusion"), model.device
    ids = torch.randint(256, (1, past + 1), device=device)
    plain = model(input_ids=ids[:, :past], use_cache=True).past_key_values
    held = copy.deepcopy(plain)
    values = torch.randn(1, features, model.config.hidden_size, device=device)
    starts = torch.zeros(1, features, dtype=torch.int64, device=device)
    media_memory.keep(held, MediaMemory(starts, fusion.remember(values)))

    def step(cache: Any) -> None:
        model(input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def anew() -> None:
        media_memory.keep(held, MediaMemory(starts, fusion.remember(values)))
        step(held)

    sides = {NONE: lambda: step(plain), KEPT: lambda: step(held), ANEW: anew}
    return compare(sides, rounds=rounds)


def train_time(model: XoronModel, length: int, *, rounds: int) -> Report:
    """Forward and backward of text alone."""
    ids = torch.randint(256, (1, length))
    model.train()

    def step(trained: bool) -> None:
        model.part("fusion").requires_grad_(trained)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return compare({FROZEN: lambda: step(False), TRAINED: lambda: step(True)}, rounds=rounds)


def main() -> int:
    """Prints both comparisons."""
    options = arguments("What the fusion adds.", rounds=7).parse_args()
    smoke, rounds = options.smoke, 1 if options.smoke else options.rounds
    past, sizes = (16, [8]) if smoke else (512, [64, 256, 1024])
    reports: dict[str, Report] = {}

    def done(name: str, report: Report) -> None:
        reports[name] = report
        if not options.json:
            print(f"\n{name}\n{report.table()}", flush=True)

    with one_thread():
        model = compose(4, smoke=smoke)
        for size in sizes:
            found = decode_time(model, size, past=past, rounds=rounds)
            done(f"decode at {past}, S {size}", found)
        found = train_time(compose(1, smoke=smoke), past, rounds=rounds)
        done(f"train step on text, 1 x {past}", found)
    if options.json:
        print(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
