"""Proves that a fusion alone teaches a frozen model to answer from media, and that it looks.

Everything but the fusion is frozen at random weights, and media positions are hidden from
self-attention. The control has no fusion and trains its whole backbone on the same batches: it can
learn the words of the answers, not which signal asks for which. Scored on fresh noise, with the
right signals and with signals swapped between questions.
"""

import math
from pathlib import Path

import pytest
import torch

import xoron_core

TOY = Path(__file__).parent / "toy"
ANSWERS = "abcd"


pytestmark = pytest.mark.usefixtures("toy")


def compose(fusion):
    parts = {"encoder": {"use": "signal-encoder"}, "projector": {"use": "signal-projector"}}
    return xoron_core.compose(
        {
            "signal": parts,
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "tokens": {"groups": ["control", "conversation"]},
            **({"fusion": {"use": "cross-attention", "num_heads": 4}} if fusion else {}),
        }
    )


def questions(processor, kinds, generator, swap=False):
    """A batch of noisy signals of these kinds, whose positions self-attention does not see."""
    shapes = torch.stack([torch.sin(torch.arange(16) * 0.3 * (k + 1)) for k in range(4)])
    noise = 0.2 * torch.randn(len(kinds), 16, generator=generator)
    heard = shapes[kinds.roll(1) if swap else kinds] + noise
    talks = [
        [
            {"role": "user", "content": [{"type": "signal", "signal": wave.numpy()}]},
            {"role": "assistant", "content": ANSWERS[kind]},
        ]
        for wave, kind in zip(heard, kinds.tolist(), strict=True)
    ]
    batch = dict(processor(talks, train=True))
    letters = torch.tensor([processor.encode_text(letter)[0] for letter in ANSWERS])
    batch["labels"] = torch.where(torch.isin(batch["labels"], letters), batch["labels"], -100)
    mask = batch["attention_mask"].clone()
    for row, start, length in batch["media"]["signal.encoder"]["spans"].tolist():
        mask[row, start : start + length] = 0
    return {**batch, "attention_mask": mask}


def learn(model, processor, trained):
    """Trains one part; gives its nats per answer and accuracy, right and with signals swapped."""
    model.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(80):
        kinds = torch.randint(4, (16,), generator=generator)
        loss = model(**questions(processor, kinds, generator)).losses["text"]
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    model.eval()
    scores = []
    with torch.no_grad():
        for swap in (False, True):
            kinds = torch.arange(4).repeat(8)
            term = model(**questions(processor, kinds, generator, swap)).losses["text"]
            correct, count = term.metrics["accuracy"]
            scores += [float(term.sum / term.count), float(correct / count)]
    return scores


@pytest.mark.slow
def test_only_the_fusion_learns_what_was_heard():
    model, processor = compose(fusion=True)
    nats, right, swapped_nats, swapped = learn(model, processor, model.fusion)
    control, processor = compose(fusion=False)
    control_nats, control_right, *_ = learn(control, processor, control.backbone)
    print(f"\nfusion alone: {nats:.3f} nats, {right:.0%} right; signals swapped: {swapped:.0%}")
    print(f"no fusion, backbone trained: {control_nats:.3f} nats, {control_right:.0%} right")
    assert right >= 0.9
    assert nats < 0.5 * math.log(4)
    assert control_right <= 0.5
    assert control_nats > 0.9 * math.log(4)
    assert swapped <= 0.2, "it answers what it hears, not what was asked for"
    assert swapped_nats > control_nats
