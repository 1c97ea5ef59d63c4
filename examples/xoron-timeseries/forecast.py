"""Compose a text and series model, train it on sea temperatures, forecast years it never saw.

    python forecast.py [--steps N] [--out DIR]

The data are monthly means of the Nino 1+2 region, 1950 to 2010 (`data/nino12.csv`, public domain).
The years before 2001 train; forecasts of the next twelve months are made every half year from then
on and judged by their mean absolute error in degrees, beside two that need no model: the last value
repeated, and the same months of the year before. With --out the trained model is saved there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xoron_core
from torch.optim.lr_scheduler import OneCycleLR
from xoron_core.session import Session

from xoron_timeseries.series import load

DATA = Path(__file__).parent / "data" / "nino12.csv"
CONTEXT, HORIZON = 24, 12  # months
TRAINING = 51 * 12  # months before 2001
SMALL = ["backbone.num_layers=2", "backbone.use_moe=false"]


def conversation(context: np.ndarray, future: np.ndarray | None = None) -> list[dict[str, Any]]:
    """A question, and its answer while training."""
    question = [{"type": "series", "series": context}, {"type": "text", "text": "next year?"}]
    talk: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if future is not None:
        answer = [{"type": "series", "series": future}]
        talk.append({"role": "assistant", "content": answer})
    return talk


def fit_levels(model: Any, processor: Any, series: np.ndarray) -> tuple[float, float]:
    """Trains the codec alone; returns its root mean squared error before and after, in degrees."""
    windows = [series[start : start + CONTEXT] for start in range(0, len(series) - CONTEXT, 6)]
    media = processor.media_batch("series.codec", windows)
    optimizer = torch.optim.Adam(model.part("series.codec").parameters(), lr=1e-3)
    errors = []
    model.train()
    for _ in range(30):
        output = model(media={"series.codec": media})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        errors.append(32 * output.loss.detach().sqrt().item())  # mantissas are of 2 ** 5 degrees
    model.part("series.codec").requires_grad_(False)
    return errors[0], errors[-1]


def train(model: Any, processor: Any, series: np.ndarray, *, steps: int) -> float:
    """Trains on random windows; returns the loss of the last step, in nats per id.

    Windows are few, so each is shifted and roughened a little: else it learns them by heart.
    """
    rng = np.random.default_rng(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    schedule = OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        talks = []
        for start in rng.integers(0, len(series) - CONTEXT - HORIZON + 1, size=16):
            window = series[start : start + CONTEXT + HORIZON]
            window = window + rng.normal(0, 0.3) + rng.normal(0, 0.3, window.shape)
            talks.append(conversation(window[:CONTEXT], window[CONTEXT:]))
        output = model(**processor(talks, train=True))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return output.loss.item()


def forecast(model: Any, processor: Any, contexts: list[np.ndarray]) -> list[np.ndarray]:
    """The next year of each context, as the session generates it."""
    talks = [conversation(context) for context in contexts]
    replies = Session(model, processor).generate(talks, begin_with="series", max_new_tokens=64)
    return [reply.media[0][1][0].numpy() for reply in replies]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs everything and prints it; returns each forecast's error in degrees."""
    parser = argparse.ArgumentParser(description="Forecast sea-surface temperatures.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    begun, series = time.monotonic(), load(DATA)
    torch.manual_seed(0)
    model, processor = xoron_core.compose(
        preset="tiny", plugins=["llm", "timeseries"], overrides=SMALL
    )
    before, after = fit_levels(model, processor, series[:TRAINING])
    print(f"codec: error of {before:.3f} degrees with even levels, {after:.3f} with fitted ones")
    loss = train(model, processor, series[:TRAINING], steps=options.steps)
    print(f"trained {options.steps} steps to {loss:.2f} nats per id")
    origins = range(TRAINING, len(series) - HORIZON + 1, 6)
    made = forecast(model, processor, [series[o - CONTEXT : o] for o in origins])
    # A forecast of another length would be a mistake too: what is missing is its last value.
    whole = [np.pad(v, (0, HORIZON), mode="edge")[:HORIZON] for v in made]
    guesses = {
        "model": whole,
        "last value": [np.repeat(series[o - 1], HORIZON) for o in origins],
        "year before": [series[o - HORIZON : o] for o in origins],
    }
    truth = np.stack([series[o : o + HORIZON] for o in origins])
    errors = {name: float(np.abs(np.stack(g) - truth).mean()) for name, g in guesses.items()}
    for name, error in errors.items():
        print(f"{name:12} {error:.2f} degrees mean absolute error, {len(truth)} held-out years")
    if options.out is not None:
        xoron_core.save(model, processor, options.out)
    print(f"{time.monotonic() - begun:.0f} s")
    return errors


if __name__ == "__main__":
    found = main()
    sys.exit(found["model"] >= found["last value"])
