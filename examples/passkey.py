"""Passkey retrieval: what YaRN gives a model that was trained at 512 positions and reads 4,096.

    python examples/passkey.py [--seed N] [--steps N] [--samples N]

A small xoron-moe is trained from scratch, with plain rotary positions, to find a key of five digits
in at most 512 tokens of noise:

    w w w KEY 3 1 4 1 5 w w ... w w QUESTION 3 1 4 1 5

Then the same weights read up to 4,096 tokens with four rotary embeddings, never trained further:
the plain one, linear interpolation (Chen et al., 2023), YaRN's frequencies alone, and YaRN with its
sharpened attention (Peng et al., 2023). The table gives the share of keys that are right in all
five digits, and of single digits. The exit code is 1 if the model did not learn its task or YaRN
does not help. Under three minutes on one quiet CPU core.

Footguns:
- Attention is grouped-query, rotated on every dimension. The part of latent attention that carries
  no position could match content at any distance.
- The rotary base goes with the trained length: 2,000 for 512 positions lies between LLaMA (10,000
  for 2,048) and Llama 2 (10,000 for 4,096).
- The model has no expert layers: they change nothing about positions.

Shapes: B rows, N positions, K digits of a key.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from xoron_llm.moe.modeling import XoronMoeForCausalLM

TRAINED_LENGTH = 512
LENGTHS = (512, 1024, 2048, 4096)
STEPS = 900
SAMPLES = 96

NUM_DIGITS = 5
_KEY, _QUESTION, _FIRST_WORD, _VOCABULARY = 10, 11, 12, 44
_SHORTEST = 32
_TOKENS_PER_STEP = 8192
_LEARNING_RATE = 5e-3
_HEAD_DIM = 32
_FACTOR = LENGTHS[-1] / TRAINED_LENGTH

_YARN = {
    "rope_type": "yarn",
    "factor": _FACTOR,
    "original_max_position_embeddings": TRAINED_LENGTH,
}
# LongRoPE with one factor for all frequencies, and no sharpening, is linear interpolation.
_LINEAR = {
    "rope_type": "longrope",
    "factor": _FACTOR,
    "original_max_position_embeddings": TRAINED_LENGTH,
    "short_factor": [_FACTOR] * (_HEAD_DIM // 2),
    "long_factor": [_FACTOR] * (_HEAD_DIM // 2),
    "attention_factor": 1.0,
}
ROTARIES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": _LINEAR,
    "yarn, not sharpened": {**_YARN, "attention_factor": 1.0},
    "yarn": _YARN,
}


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]: of keys with all digits right, and of digits right."""

    keys: float
    digits: float

    def __str__(self) -> str:
        return f"{self.keys:.2f} {self.digits:.2f}"


def passages(length: int, depths: Tensor, *, generator: torch.Generator) -> Tensor:
    """Noise with a key in it, and at the end the question and the key again.

    Args:
        length: N, all in all; at least 2 K + 2.
        depths: (B,) in [0, 1): where the key stands, 0 at the very beginning.
        generator: of the noise and the digits.

    Returns:
        (B, N) int64 ids. Noise holds no digit and no marker.
    """
    B = len(depths)
    shape = (B, length)
    ids = torch.randint(_FIRST_WORD, _VOCABULARY, shape, generator=generator)
    digits = torch.randint(0, 10, (B, NUM_DIGITS), generator=generator)
    starts = (depths * (length - 2 * NUM_DIGITS - 1)).long()[:, None]
    ids.scatter_(1, starts, _KEY)
    ids.scatter_(1, starts + 1 + torch.arange(NUM_DIGITS), digits)
    ids[:, -NUM_DIGITS - 1] = _QUESTION
    ids[:, -NUM_DIGITS:] = digits
    return ids


def build(rotary: str = "plain") -> XoronMoeForCausalLM:
    """The untrained model, two layers of width 64, with one of `ROTARIES`."""
    from xoron_llm.moe.configuration import XoronMoeConfig
    from xoron_llm.moe.modeling import XoronMoeForCausalLM

    config = XoronMoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=_HEAD_DIM,
        intermediate_size=64,
        use_moe=False,
        rope_parameters={"rope_theta": 2000.0, **ROTARIES[rotary]},
        initializer_range=0.1,
    )
    return XoronMoeForCausalLM(config)


def train(steps: int = STEPS, *, seed: int = 0) -> XoronMoeForCausalLM:
    """Trains the plain model on the digits of the answer, short passages first.

    The longest passage grows from 32 to 512 over the first four fifths of the steps: in a short one
    the key is found by chance, and what finds it then carries over to longer ones.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    for step in range(steps):
        growth = min(1.0, step / (0.8 * steps)) * float(torch.rand((), generator=generator)) ** 0.5
        length = int(_SHORTEST * (TRAINED_LENGTH / _SHORTEST) ** growth)
        depths = torch.rand(_TOKENS_PER_STEP // length, generator=generator)
        ids = passages(length, depths, generator=generator)
        warm, cool = (step + 1) / 50, (steps - step) / (0.3 * steps)
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, warm, cool)
        logits = _answer_logits(model, ids)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, -NUM_DIGITS:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:4}  length {length:3}  loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def score(model: XoronMoeForCausalLM, length: int, *, samples: int = SAMPLES) -> Score:
    """How well a model finds keys at depths spread evenly over passages of one length.

    Every model is asked the same questions. The digits before the one asked for are the true ones;
    all digits are right so exactly if greedy decoding gives the key.
    """
    # Far from the small seeds of training, whose passages would be these ones.
    generator = torch.Generator().manual_seed(1_000_000 + length)
    depths = (torch.arange(samples) + 0.5) / samples
    right = []
    for some in depths.split(4):
        ids = passages(length, some, generator=generator)
        right.append(_answer_logits(model, ids).argmax(-1) == ids[:, -NUM_DIGITS:])
    hits = torch.cat(right).float()
    return Score(float(hits.prod(-1).mean()), float(hits.mean()))


def with_rotary(model: XoronMoeForCausalLM, rotary: str) -> XoronMoeForCausalLM:
    """The same weights under another of `ROTARIES`."""
    other = build(rotary)
    other.load_state_dict(model.state_dict())
    return other.eval()


def table(scores: dict[str, list[Score]], lengths: tuple[int, ...] = LENGTHS) -> str:
    """Scores by rotary embedding, one column per length: keys right, digits right."""
    head = f"{'keys, digits right at':22}" + "".join(f"{length:>11,}" for length in lengths)
    rows = (f"{name:22}" + "".join(f"{s!s:>11}" for s in row) for name, row in scores.items())
    return "\n".join((head, *rows))


def main() -> int:
    """Trains, scores, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description="Passkey retrieval with and without YaRN.")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training passages")
    parser.add_argument("--steps", type=_positive, default=STEPS, help="optimizer steps")
    parser.add_argument("--samples", type=_positive, default=SAMPLES, help="keys per length")
    options = parser.parse_args()
    model = train(options.steps, seed=options.seed)
    scores: dict[str, list[Score]] = {}
    for name in ROTARIES:
        other = with_rotary(model, name)
        scores[name] = [score(other, length, samples=options.samples) for length in LENGTHS]
    print(table(scores))
    plain, yarn = scores["plain"], scores["yarn"]
    if plain[0].keys < 0.9:
        print("the model did not learn its task at 512; train longer", file=sys.stderr)
        return 1
    return 0 if yarn[-1].keys > plain[-1].keys else 1


def _answer_logits(model: XoronMoeForCausalLM, ids: Tensor) -> Tensor:
    """(B, N) ids to (B, K, V): from the question on, each position predicts the next digit."""
    kept = NUM_DIGITS + 1
    return model(ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
