"""A self-contained HTML page about a run: the loss curve as inline SVG, numbers, a sample.

It loads nothing from anywhere, so it can be mailed or opened from a disk.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 56, 36
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem;"
    "color:#1d1d1f;background:#fff}table{border-collapse:collapse}td,th{padding:.25rem .75rem;"
    "border-bottom:1px solid #ddd;text-align:left}td+td{text-align:right}"
    "pre{background:#f4f4f6;padding:1rem;overflow-x:auto;white-space:pre-wrap}"
    "svg text{font:12px system-ui,sans-serif;fill:#555}"
)


def render_report(
    title: str,
    *,
    records: Sequence[Mapping[str, Any]],
    scores: Mapping[str, float],
    facts: Mapping[str, str],
    prompt: str,
    sample: str,
) -> str:
    """Returns the page.

    Args:
        title: its heading.
        records: of `metrics.jsonl`.
        scores: held-out bits per byte by model name, best known first or not.
        facts: further name and value pairs.
        prompt, sample: what the model was given and what it wrote.
    """
    best = min(scores.values())
    score_rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_emphasis(f'{value:.4f}', value == best)}</td></tr>"
        for name, value in scores.items()
    )
    fact_rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    train = [(r["step"], r["losses"]["text"]) for r in records if r["kind"] == "train"]
    held = [(r["step"], r["loss"]) for r in records if "loss" in r and r["kind"] == "eval"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        "<h2>Held-out bits per byte</h2><table><tr><th>model</th><th>bits per byte</th></tr>"
        f"{score_rows}</table><h2>Loss</h2>{loss_curve(train, held)}"
        f"<h2>Run</h2><table>{fact_rows}</table><h2>Sample</h2>"
        f"<pre><b>{html.escape(prompt)}</b>{html.escape(sample)}</pre></body></html>\n"
    )


def loss_curve(
    train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]] = ()
) -> str:
    """Returns an SVG of (step, nats per token) points: a line for training, dots for held-out.

    Raises:
        ValueError: if there is no training point.
    """
    if not train:
        raise ValueError("there is no training loss to draw")
    values = [value for _, value in [*train, *held_out]]
    low, high = math.floor(min(values) * 2) / 2, math.ceil(max(values) * 2) / 2
    last = max(step for step, _ in [*train, *held_out])

    def place(step: int, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 8) * step / last
        y = 8 + (_HEIGHT - _BOTTOM - 8) * (high - value) / ((high - low) or 1)
        return round(x, 1), round(y, 1)

    ticks = [low + (high - low) * k / 4 for k in range(5)]
    lines = []
    for tick in ticks:
        _, y = place(0, tick)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:.2f}</text>')
    points = " ".join("{},{}".format(*place(*point)) for point in train)
    dots = "".join(
        '<circle cx="{}" cy="{}" r="4" fill="#c2410c"/>'.format(*place(*point))
        for point in held_out
    )
    base = _HEIGHT - 10
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss by step">'
        f'{"".join(lines)}<polyline points="{points}" fill="none" stroke="#1d4ed8"'
        f' stroke-width="1.5"/>{dots}<text x="{_LEFT}" y="{base}">step 0</text>'
        f'<text x="{_WIDTH - 8}" y="{base}" text-anchor="end">step {last}; line: training,'
        " dots: held out; nats per token</text></svg>"
    )


def _emphasis(text: str, wanted: bool) -> str:
    return f"<b>{text}</b>" if wanted else text
