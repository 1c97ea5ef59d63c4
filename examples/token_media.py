"""The token demo: a model for which media are ids like words, which it reads and which it makes.

    python examples/token_media.py {digits,speech} [--out DIR] [--smoke]

`digits` are images of scanned digits, `speech` recordings of spoken ones. First a codec learns to
turn media into ids and back, then a language model learns both directions: from the medium to the
digit, and from the digit to the medium. The demo prints

    read     the digit named from other people's media, exactly right; chance is one in ten
    kept     other people's media that a classifier still reads after the codec, as a share of
             those that it reads before; it never saw anything but originals
    made     media that the same classifier reads as the digit that was asked for, and (control)
             as the digit that another conversation asked for
    entropy  of how often the codec's ids are used, as a share of the most there could be
    decoded  answers with a medium that decodes

and the task's suite of gates (as `xoron gate` does: what is made is legal and decodes, the model
uses what it is shown and told), and leaves in the output folder the untrained model, `codec/model`
and `run/model`, with which `xoron generate` works:

    xoron generate run/model "Draw a 7." --make image -o 7.safetensors
    xoron generate run/model "Say 7." --make audio --sampling audio.temperature=0.5 -o 7.safetensors
    xoron generate run/model "Which digit is said?" --media audio=digit.wav

The exit code is 1 if a goal is missed. `--smoke` makes a few steps, to see that everything runs; it
judges nothing.

Footgun: greedy speech drags on to the longest that is allowed; sample it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_kit
import numpy as np

GOALS = {"read": 0.9, "kept": 0.9, "made": 0.8, "entropy": 0.6, "decoded": 1.0}
_TEXTS = 200
_VOCABULARY = 300
_SAMPLES = 1000
_BATCH = 100
BACKBONE = {
    "use": "xoron-moe",
    "preset": "tiny",
    "use_moe": False,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 3,
    "intermediate_size": 256,
}


@dataclass(frozen=True)
class Task:
    """What the demo needs to know of a medium.

    Attributes:
        data: name of the data set, of the second recipe, and with `-codec` of the first.
        modality: of the medium.
        codec: what stands in the slot `MODALITY.codec`.
        open: split and options to the data set.
        reader: makes the classifier; its `read` takes media as the data set draws them.
        as_drawn: decoded media, first axis items, to media as the data set draws them.
    """

    data: str
    modality: str
    codec: dict[str, Any]
    open: Callable[..., Any]
    reader: Callable[[], Any]
    as_drawn: Callable[[Any], Sequence[Any]]

    @property
    def slot(self) -> str:
        """Of the codec."""
        return f"{self.modality}.codec"


def main() -> int:
    """Runs the demo and returns the exit code."""
    parser = demo_kit.parser("Teach a language model to read and make media.", "token-TASK")
    parser.add_argument("task", choices=sorted(TASKS))
    options = parser.parse_args()
    out = options.out or demo_kit.free_folder(f"token-{options.task}")
    return demo_kit.run(lambda: demo(TASKS[options.task](), out, smoke=options.smoke))


def demo(task: Task, out: Path, *, smoke: bool) -> int:
    """Composes, trains twice, judges and reports."""
    from xoron_core.api import compose, load, save
    from xoron_train import load_recipe, train

    begun = time.monotonic()
    samples = 2 * _BATCH if smoke else _SAMPLES
    few = ["max_steps=3", "warmup_steps=1", "final_eval_batches=1"] if smoke else []
    fewer = [*few, "evaluations.read.samples=8"] if smoke else []
    recipes = load_recipe(f"{task.data}-codec", few), load_recipe(task.data, fewer)
    vocabulary = _learn_tokenizer(out, task)
    composition = {
        task.modality: {"codec": task.codec},
        "tokenizer": {"use": "bpe", "source": str(vocabulary)},
        "backbone": BACKBONE,
        "tokens": {"groups": ["control", "conversation", "multimodal"]},
    }
    model, processor = compose(composition)
    save(model, processor, out / "untrained")
    codec = train(recipes[0], out / "codec", model=out / "untrained")
    result = train(recipes[1], out / "run", model=codec.model_folder)
    minutes = (time.monotonic() - begun) / 60
    model, processor = load(result.model_folder)
    reader = task.reader()
    scores = {"read": result.evaluation["evaluations"]["read"]["score"]}
    scores |= _kept(task, model, processor, reader=reader, samples=samples)
    scores |= _made(task, model, processor, reader=reader, samples=samples)
    print(f"parameters       {sum(p.numel() for p in model.parameters()):>12,}")
    print(f"optimizer steps  {codec.steps + result.steps:>12,}\nminutes in all   {minutes:>12.1f}")
    for name, value in scores.items():
        print(f"{name:16} {value:>12.1%}" + (f"  goal {GOALS[name]:.0%}" if name in GOALS else ""))
    missed = [name for name, goal in GOALS.items() if scores[name] < goal]
    missed += _gates(task, result.model_folder, smoke=smoke)
    print(f"model:  {result.model_folder}")
    if smoke or not missed:
        return 0
    print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1


def _gates(task: Task, folder: Path, *, smoke: bool) -> list[str]:
    """Asks the task's suite of gates, as `xoron gate` does; returns those that are not passed."""
    from xoron_core.cli.plugin_list import print_table
    from xoron_train.gates.report import report_path, table, write_report
    from xoron_train.gates.run import run_suite
    from xoron_train.gates.suite import load_suite

    suite = load_suite(task.data)
    if smoke:
        suite = load_suite(task.data, [f"gates.{name}.samples=8" for name in suite.gates])
    report = run_suite(folder, suite)
    write_report(report, report_path(folder, suite.name))
    print_table(table(report))
    return [name for name, gate in report.gates.items() if not gate.passed]


def _kept(task: Task, model: Any, processor: Any, *, reader: Any, samples: int) -> dict[str, float]:
    """What the codec keeps of media that nothing was trained on, and how it uses its ids."""
    import torch

    from xoron_core.nn.quantize import usage_entropy

    drawn = [task.open("held-out").draw(index) for index in range(samples)]
    digits, media = np.array([digit for digit, _ in drawn]), [medium for _, medium in drawn]
    again: list[Any] = []
    used: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, samples, _BATCH):
            batch = processor.media_batch(task.slot, media[start : start + _BATCH])
            codes = model.call(task.slot, "encode", **batch)
            again += task.as_drawn(model.call(task.slot, "decode", codes.ids, codes.metadata))
            used.append(codes.ids[codes.mask])  # not what fills up short recordings
    before = float((reader.read(media) == digits).mean())
    after = float((reader.read(again) == digits).mean())
    part = model.part(task.slot)
    sizes = [found.size for found in part.ranges(part.config)]
    counts = [
        torch.bincount(ids, minlength=size)
        for ids, size in zip(torch.cat(used).unbind(-1), sizes, strict=True)
    ]
    entropy = min(float(usage_entropy(one)) for one in counts)
    return {"read before": before, "read after": after, "kept": after / before, "entropy": entropy}


def _made(task: Task, model: Any, processor: Any, *, reader: Any, samples: int) -> dict[str, float]:
    """Whether what is made is what was asked for."""
    from xoron_core.sampling import Sampling
    from xoron_core.session import Session

    split = task.open("made")
    session = Session(model, processor)
    asked: list[int] = []
    made: list[Any] = []
    for start in range(0, samples, _BATCH):
        prompts = [split[index].messages[:1] for index in range(start, start + _BATCH)]
        replies = session.generate(
            prompts,
            makes=[task.modality],
            sampling=Sampling(temperature=0.5, seed=start, vary_rows=True),
        )
        for index, reply in enumerate(replies, start):
            if reply.media:
                asked.append(split.draw(index)[0])
                made += task.as_drawn(reply.media[0][1])
    digits = np.array(asked)
    read = reader.read(made) if made else digits
    return {
        "made": float((read == digits).sum() / samples),
        "made (control)": float((read == np.roll(digits, 1)).sum() / samples),
        "decoded": len(made) / samples,
    }


def _learn_tokenizer(out: Path, task: Task) -> Path:
    """A vocabulary in which each word of what is asked and answered is one id."""
    from xoron_llm.tokenizers.trained import learn, write

    train = task.open("train")
    texts = []
    for index in range(_TEXTS):
        for message in train[index].messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            texts += [part["text"] for part in parts if "text" in part]
    out.mkdir(parents=True, exist_ok=True)
    write(learn(texts, size=_VOCABULARY), out / "tokenizer.json")
    return out / "tokenizer.json"


def _digits() -> Task:
    from xoron_train.tasks.token_digits.dataset import TokenDigits
    from xoron_train.tasks.token_digits.reader import DigitReader

    return Task(
        data="token-digits",
        modality="image",
        # 4 by 4 ids of 256.
        codec={
            "use": "vq-image",
            "preset": "tiny",
            "channels": [16, 32, 64, 64],
            "codebook_size": 256,
        },
        open=TokenDigits,
        reader=DigitReader,
        as_drawn=lambda images: list(np.asarray(images.permute(0, 2, 3, 1)) * 255),
    )


def _speech() -> Task:
    from xoron_train.tasks.token_speech.dataset import TokenSpeech
    from xoron_train.tasks.token_speech.reader import SpeechReader

    return Task(
        data="token-speech",
        modality="audio",
        codec={"use": "rvq-audio", "preset": "tiny"},
        open=TokenSpeech,
        reader=SpeechReader,
        as_drawn=list,
    )


TASKS = {"digits": _digits, "speech": _speech}


if __name__ == "__main__":
    sys.exit(main())
