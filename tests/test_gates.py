"""Proves gates on composed models of several packages: a model that grew out of a text model says
text as that did, number by number, whatever its new rows are; one codec that reads and makes is
judged both ways.
"""

from __future__ import annotations

import json

import pytest
import torch

import xoron_core
from tests.test_migrate import compose
from xoron_core.cli import run
from xoron_train.evaluations import Conversation, evaluate_making, evaluate_text_unchanged
from xoron_train.gates.report import read_report, report_path

pytestmark = pytest.mark.usefixtures("toy")
TEXTS = [
    Conversation(str(n), [{"role": "user", "content": "def f(x):\n    return x" + "é" * n}])
    for n in range(8)
]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def grown(request, tmp_path):
    """A text model and the same with a codec, in two folders."""
    base, more = tmp_path / "base", tmp_path / "more"
    xoron_core.save(*compose(request.param), base)
    codec = ["--set", "signal.codec.use=signal-codec"]
    assert run(["-q", "compose", "--extend", str(base), "-o", str(more), *codec]) == 0
    return base, more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_grew_says_text_as_before(grown, dtype):
    base, more = grown
    model, processor = xoron_core.load(more, dtype=dtype)
    old = xoron_core.load(base)[0]
    assert len(model.get_output_embeddings().weight) > len(old.get_output_embeddings().weight)
    record = evaluate_text_unchanged(model, processor, TEXTS, base=base)
    assert (record["largest"], record["changed"]) == (0, 0)
    with torch.no_grad():
        model.get_input_embeddings().weight[: model.space.text_size] *= 1.5
    assert evaluate_text_unchanged(model, processor, TEXTS, base=base)["largest"] > 0


def test_the_command_writes_what_a_random_model_shows(grown, tmp_path, capsys):
    """It is legal and decodes, says text as before, and neither listens nor sees."""
    base, more = grown
    wave = tmp_path / "wave.txt"
    wave.write_text("\n".join(str(0.1 * n) for n in range(16)))
    other = tmp_path / "other.txt"
    other.write_text("\n".join(str(-0.2 * n) for n in range(16)))

    def talk(number):
        signal = {"type": "signal", "path": ["wave.txt", "other.txt"][number % 2]}
        asked = f"number {number}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [signal]}]
        shown = [
            {"role": "user", "content": [signal, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": str(number % 2)},
        ]
        return [{"messages": messages}, {"messages": shown}]

    lines = [json.dumps(row) for number in range(12) for row in talk(number)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    sets = [
        "mixture.media.kind=conversations",
        f"mixture.media.path={tmp_path / 'talks.jsonl'}",
        "gates.text-unchanged.samples=8",
        "gates.making.samples=24",
        "gates.making.max_new_tokens=8",
        "gates.media-ablation.samples=12",
        "gates.prompt-ablation.samples=12",
    ]
    words = [word for item in sets for word in ("--set", item)]
    assert run(["gate", str(more), "tokens", "--base", str(base), *words]) == 1
    report = read_report(report_path(more, "tokens"))
    passed = {name: gate.passed for name, gate in report.gates.items()}
    assert passed["text-unchanged"]
    assert passed["making"]
    assert not passed["media-ablation"]
    made = report.gates["making"].record
    assert made["made"] == {"signal": 12, "text": 12}
    assert (made["out_of_range"], made["decoded"]) == (0, 1)
    assert made["unguided"] > 0.5
    assert report.gates["media-ablation"].record["shuffled"]["samples"] == 12


def test_the_same_answers_are_made_in_batches_and_alone(grown):
    model, processor = xoron_core.load(grown[1])
    content = [{"type": "signal", "signal": torch.ones(9).numpy()}]
    samples = [
        Conversation(
            str(n),
            [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": content}],
        )
        for n in range(1, 8)
    ]
    records = [
        evaluate_making(model, processor, samples, max_new_tokens=12, batch_size=size)
        for size in (1, 3, 7)
    ]
    assert records[0] == records[1] == records[2]
