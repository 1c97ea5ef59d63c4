"""What training new vocabulary rows alone saves against training the whole matrices.

Memory of AdamW at the published size, 151,669 text ids grown to 164,021 over Qwen3-8B, is counted
from shapes; at a tenth of the ids and a thirty-second of the width it is measured, on the
optimizer of a real model after a step. In both, everything but embedding and head is frozen, and
parameters, gradients and states are fp32. Beside it the time of a training step of 1 x 256 ids, on
one thread: forward, backward, optimizer.

    hatch run bench rows
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import Report, Side, arguments, compare, one_thread
from xoron_core.losses import text_loss
from xoron_core.nn.split_rows import split, vocabulary

TEXT_IDS, ALL_IDS, WIDTH = 151_669, 164_021, 4096
WHOLE, ROWS = "whole matrices", "new rows"
_FP32 = 4


class Bytes(NamedTuple):
    """Memory that a way of training takes beside the model.

    Attributes:
        states: of the optimizer.
        gradients: of what is trained.
    """

    states: int
    gradients: int


def counted(rows: int, width: int, *, matrices: int) -> Bytes:
    """AdamW holds two numbers per trained one, and the gradient is a third."""
    numbers = matrices * rows * width
    return Bytes(2 * numbers * _FP32, numbers * _FP32)


def measured(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> Bytes:
    """What is there behind a backward pass and a step."""
    held = (t for state in optimizer.state.values() for t in state.values() if t.ndim)
    grads = (p.grad for p in trained if p.grad is not None)
    return Bytes(sum(t.nbytes for t in held), sum(t.nbytes for t in grads))


def model(text_ids: int, all_ids: int, width: int, *, rows: bool) -> tuple[Qwen3ForCausalLM, list]:
    """A model and what is trained of it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=all_ids,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        tie_word_embeddings=False,
    )
    made = Qwen3ForCausalLM(config).requires_grad_(False)
    if rows:
        return made, split(made, torch.arange(text_ids, all_ids))
    whole = [module.weight.requires_grad_(True) for module in vocabulary(made)]
    return made, whole


def step_of(
    text_ids: int, all_ids: int, width: int, *, rows: bool
) -> tuple[Side, Callable[[], Bytes]]:
    """A training step, and what measures its memory."""
    made, trained = model(text_ids, all_ids, width, rows=rows)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    ids = torch.randint(all_ids, (1, 256), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimizer.zero_grad()
        head = made.get_output_embeddings()
        term = text_loss(made.base_model(ids).last_hidden_state, ids, head, head=head)
        (term.sum / term.count).backward()
        optimizer.step()

    return step, lambda: measured(optimizer, trained)


def memory_table(sides: dict[str, Bytes]) -> str:
    """Megabytes by side, and how much less the rows take."""
    lines = [f"{'':16}  {'optimizer MB':>12}  {'gradients MB':>12}"]
    for name, found in sides.items():
        lines.append(f"{name:16}  {found.states / 1e6:12.1f}  {found.gradients / 1e6:12.1f}")
    lines.append(f"{'ratio':16}  {ratio(sides):12.2f}")
    return "\n".join(lines)


def ratio(sides: dict[str, Bytes]) -> float:
    """Optimizer memory of whole matrices over that of new rows."""
    return sides[WHOLE].states / sides[ROWS].states


def main() -> int:
    """Prints the memory of both ways and the time of a step."""
    options = arguments("Row training against full-matrix training.", rounds=7).parse_args()
    shrink, narrow = (1000, 128) if options.smoke else (10, 32)
    sizes = (TEXT_IDS // shrink, ALL_IDS // shrink, WIDTH // narrow)
    new = ALL_IDS - TEXT_IDS
    published = {
        WHOLE: counted(ALL_IDS, WIDTH, matrices=2),
        ROWS: counted(new, WIDTH, matrices=2),
    }
    with one_thread():
        made = {name: step_of(*sizes, rows=name == ROWS) for name in (WHOLE, ROWS)}
        steps = {name: step for name, (step, _) in made.items()}
        time: Report = compare(steps, rounds=1 if options.smoke else options.rounds)
    small = {name: measure() for name, (_, measure) in made.items()}
    title = f"measured, {sizes[0]:,} -> {sizes[1]:,} ids, width {sizes[2]}"
    memory: dict[str, dict[str, Bytes]] = {
        f"counted, {TEXT_IDS:,} -> {ALL_IDS:,} ids, width {WIDTH}": published,
        title: small,
    }
    if options.json:
        found = {
            name: {**{side: b._asdict() for side, b in sides.items()}, "ratio": ratio(sides)}
            for name, sides in memory.items()
        }
        print(json.dumps({"memory": found, "step": asdict(time)}, indent=2))
        return 0
    for name, sides in memory.items():
        print(f"\n{name}\n{memory_table(sides)}")
    print(f"\ntraining step\n{time.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
