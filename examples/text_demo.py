"""The text demo: compose the tiny model, train it on this Python's standard library, and judge it.

    python examples/text_demo.py [--steps N] [--out DIR] [--smoke]

It prints held-out bits per byte beside a unigram and an order-2 byte model that were fitted on the
same training files, samples a continuation, and leaves in the output folder

    untrained/     the composed model folder
    run/model/     the trained one (`xoron generate` opens it), beside metrics and checkpoints
    report.html    the loss curve, the numbers and the sample

The exit code is 1 if the model does not beat order 2. `--smoke` makes three steps on a few files,
to see that everything runs; it judges nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_kit

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor
    from xoron_train.recipe import Recipe

PROMPT = "import os\n\n\ndef read_lines(path):\n"
_SAMPLE_TOKENS = 400


@dataclass(frozen=True)
class Outcome:
    """Held-out bits per byte by model name, ours last, and the bytes they were scored on."""

    scores: dict[str, float]
    num_files: int
    num_bytes: int

    @property
    def beaten(self) -> bool:
        """Whether the trained model is better than every baseline."""
        *baselines, ours = self.scores.values()
        return ours < min(baselines)


def main() -> int:
    """Runs the demo and returns the exit code."""
    parser = demo_kit.parser("Compose, train and judge a tiny text model.", "text-demo")
    parser.add_argument("--steps", type=int, help="optimizer steps; the recipe's if not given")
    options = parser.parse_args()
    out = options.out or demo_kit.free_folder("text-demo")
    return demo_kit.run(lambda: demo(out, steps=options.steps, smoke=options.smoke))


def demo(out: Path, *, steps: int | None, smoke: bool) -> int:
    """Composes, trains, judges and reports."""
    from xoron_core.api import compose, load, save
    from xoron_train import load_recipe, train

    begun = time.monotonic()
    model, processor = compose(preset="tiny", plugins="llm")
    save(model, processor, out / "untrained")
    recipe = load_recipe("text-tiny", _overrides(steps, smoke))
    result = train(recipe, out / "run", model=out / "untrained")
    outcome = _judge(recipe, result.evaluation)
    sample = _sample(*load(result.model_folder), tokens=20 if smoke else _SAMPLE_TOKENS)
    minutes = (time.monotonic() - begun) / 60
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "optimizer steps": f"{result.steps:,}",
        "training tokens": f"{_tokens(out / 'run'):,}",
        "held-out files": f"{outcome.num_files:,}",
        "held-out bytes": f"{outcome.num_bytes:,}",
        "minutes in all": f"{minutes:.1f}",
    }
    report = _write_report(out, outcome, facts, sample)
    _print_outcome(outcome, facts, sample)
    print(f"model:  {result.model_folder}\nreport: {report}")
    if smoke or outcome.beaten:
        return 0
    print("the model does not beat the order-2 byte model; train longer", file=sys.stderr)
    return 1


def _overrides(steps: int | None, smoke: bool) -> list[str]:
    overrides = []
    if smoke:
        # Some sixty files: enough that some are held out.
        overrides += ["mixture.stdlib.pattern='[a-d]*.py'", "max_steps=3", "eval_every=2"]
    if steps is not None:
        overrides.append(f"max_steps={steps}")
    return overrides


def _judge(recipe: Recipe, evaluation: Mapping[str, Any]) -> Outcome:
    """Fits the baselines on the training files and scores them on the held-out bytes."""
    from xoron_core.errors import XoronError
    from xoron_train.baselines import ByteModel
    from xoron_train.data.stream import held_out_texts, training_texts

    training = [text.encode() for text in training_texts(recipe, "stdlib")]
    held_out = [text.encode() for text in held_out_texts(recipe, "stdlib")]
    size = sum(map(len, held_out))
    if size != evaluation["bytes"]:
        raise XoronError(
            f"the model was scored on {evaluation['bytes']} bytes, the baselines would be on"
            f" {size}; leave final_eval_batches unset"
        )
    scores = {
        "unigram": ByteModel(0).fit(training).bits_per_byte(held_out),
        "order-2": ByteModel(2).fit(training).bits_per_byte(held_out),
        "xoron tiny": evaluation["bits_per_byte"],
    }
    return Outcome(scores, len(held_out), size)


def _sample(model: XoronModel, processor: XoronProcessor, *, tokens: int) -> str:
    from xoron_core.events import TextDelta
    from xoron_core.sampling import Sampling
    from xoron_core.session import Session

    sampling = Sampling(temperature=0.7, top_p=0.95, seed=0)
    events = Session(model, processor).stream(PROMPT, max_new_tokens=tokens, sampling=sampling)
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def _tokens(run: Path) -> int:
    from xoron_train.metrics import read_metrics

    return max(r["tokens"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train")


def _write_report(out: Path, outcome: Outcome, facts: dict[str, str], sample: str) -> Path:
    from xoron_train.metrics import read_metrics
    from xoron_train.report import render_report

    page = render_report(
        "A tiny text model on the Python standard library",
        records=read_metrics(out / "run/metrics.jsonl"),
        scores=outcome.scores,
        facts=facts,
        prompt=PROMPT,
        sample=sample,
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _print_outcome(outcome: Outcome, facts: dict[str, str], sample: str) -> None:
    for name, value in facts.items():
        print(f"{name:16} {value:>12}")
    print("\nheld-out bits per byte")
    for name, score in outcome.scores.items():
        print(f"{name:16} {score:12.4f}")
    print(f"\nsample\n{PROMPT}{sample}\n")


if __name__ == "__main__":
    sys.exit(main())
