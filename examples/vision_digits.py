"""The vision demo: compose a tiny model that takes images, teach it scanned digits, and judge it.

    python examples/vision_digits.py [--steps N] [--out DIR] [--smoke]

It prints how often the trained model answers exactly right, by kind of question: on other people's
handwriting (`held-out`) and on things in colours that they never had in training (`unseen`), beside

    zeroed   the same questions with the image features set to zero
    chance   always the most frequent answer to that kind of question in training
    text     always the most frequent answer to that very text in training

and leaves in the output folder

    tokenizer.json learned from the questions
    untrained/     the composed model folder
    labels/        the first stage, which teaches what lies where
    run/model/     the trained one (`xoron generate` opens it), beside metrics and checkpoints

The exit code is 1 if it misses 90 % on held-out, 70 % on unseen, or if the zeroed control does
better than the text. `--smoke` makes a few steps, to see that everything runs; it judges nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_kit

# `tiny` with an encoder that learns from few images, and a smaller backbone.
OVERRIDES = (
    "tokenizer.use=bpe",
    "image.encoder.use=conv-vit",
    "image.projector.use=mlp",
    "backbone.use_moe=false",
    "backbone.hidden_size=128",
    "backbone.num_heads=4",
    "backbone.num_kv_heads=2",
    "backbone.num_layers=3",
    "backbone.intermediate_size=256",
)
# Ids at most, 256 bytes among them: enough for all words that are used.
_VOCABULARY = 512
_TEXTS = 1000
GOALS = {"held-out": 0.9, "unseen": 0.7}
# What a control may be above what the text gives away: three standard errors of 1,000 answers.
_SLACK = 0.05
_KINDS = ("digit", "colour", "count", "side")
_COLUMNS = ("model", "zeroed", "chance", "text")
Scores = dict[str, dict[str, float]]


def main() -> int:
    """Runs the demo and returns the exit code."""
    parser = demo_kit.parser("Compose, train and judge a model that sees.", "vision-digits")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each stage; the recipes' if not given"
    )
    options = parser.parse_args()
    out = options.out or demo_kit.free_folder("vision-digits")
    return demo_kit.run(lambda: demo(out, steps=options.steps, smoke=options.smoke))


def demo(out: Path, *, steps: int | None, smoke: bool) -> int:
    """Composes, trains, judges and reports."""
    from xoron_core.api import compose, save
    from xoron_train import load_recipe, train

    begun = time.monotonic()
    labels = load_recipe("vision-digits-labels", _overrides(steps, smoke))
    recipe = load_recipe("vision-digits", _overrides(steps, smoke) + _smaller(smoke))
    vocabulary = _learn_tokenizer(out, recipe.mixture["digits"].options)
    overrides = (*OVERRIDES, f"tokenizer.source={vocabulary}")
    model, processor = compose(preset="tiny", plugins="llm,vision", overrides=overrides)
    save(model, processor, out / "untrained")
    seen = train(labels, out / "labels", model=out / "untrained")
    result = train(recipe, out / "run", model=seen.model_folder)
    minutes = (time.monotonic() - begun) / 60
    records = result.evaluation["evaluations"]
    print(f"parameters       {sum(p.numel() for p in model.parameters()):>12,}")
    print(f"optimizer steps  {seen.steps + result.steps:>12,}\nminutes in all   {minutes:>12.1f}")
    missed = []
    for split, goal in GOALS.items():
        scores = _scores(records[split], recipe.mixture["digits"].options, split)
        _print(split, scores)
        missed += _missed(split, scores["all"], goal)
    print(f"model:  {result.model_folder}")
    if smoke or not missed:
        return 0
    print("\n".join(missed), file=sys.stderr)
    return 1


def _learn_tokenizer(out: Path, options: Mapping[str, Any]) -> Path:
    """A vocabulary in which each word of questions, answers and labels is one id."""
    from xoron_llm.tokenizers.trained import learn, write
    from xoron_train.tasks.digits.dataset import digits

    train = digits("train", **options)
    texts = []
    for index in range(_TEXTS):
        image, question = train[index].messages[0]["content"]
        texts += [*image["labels"], question["text"]]
        texts += [message["content"] for message in train[index].messages[1:]]
    out.mkdir(parents=True, exist_ok=True)
    write(learn(texts, size=_VOCABULARY), out / "tokenizer.json")
    return out / "tokenizer.json"


def _overrides(steps: int | None, smoke: bool) -> list[str]:
    overrides = []
    if smoke:
        overrides += ["max_steps=3", "warmup_steps=1", "eval_every=2", "eval_batches=1"]
        overrides.append("final_eval_batches=1")
    if steps is not None:
        overrides.append(f"max_steps={steps}")
    return overrides


def _smaller(smoke: bool) -> list[str]:
    return [f"evaluations.{name}.samples=8" for name in ("seeing", *GOALS)] if smoke else []


def _scores(record: Mapping[str, Any], options: Mapping[str, Any], split: str) -> Scores:
    """Shares of right answers, in all and by kind, for each of the columns."""
    from xoron_train.tasks.digits.baselines import Guesses
    from xoron_train.tasks.digits.dataset import digits

    asked = digits(split, **options)
    chance, text = Guesses(seed=asked.options.seed).scores(asked, samples=record["samples"])
    zeroed = record["controls"]["zeroed"]
    scores = {"all": (record["score"], zeroed["score"], chance["all"], text["all"])}
    for kind in _KINDS:
        ours, control = record["kinds"][kind]["score"], zeroed["kinds"][kind]["score"]
        scores[kind] = (ours, control, chance[kind], text[kind])
    return {kind: dict(zip(_COLUMNS, row, strict=True)) for kind, row in scores.items()}


def _missed(split: str, scores: Mapping[str, float], goal: float) -> list[str]:
    found = []
    if scores["model"] < goal:
        found.append(f"{split}: {scores['model']:.1%} right, the goal is {goal:.0%}")
    if scores["zeroed"] > max(scores["chance"], scores["text"]) + _SLACK:
        found.append(f"{split}: {scores['zeroed']:.1%} right without the image, more than chance")
    return found


def _print(split: str, scores: Scores) -> None:
    print(f"\n{split:10}" + "".join(f"{column:>10}" for column in _COLUMNS))
    for kind, row in scores.items():
        print(f"{kind:10}" + "".join(f"{row[column]:10.1%}" for column in _COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
