"""Proves that `rvq-audio` learns: spoken digits of voices that it never heard come back nearer than
the mean spectrum of those it heard, and its codes are in use. Prints how near, and how even.
"""

import numpy as np
import pytest
import torch

from xoron_audio.codec.spectrum import log_mel
from xoron_audio.speech_digits import VOICES, speak, utterances
from xoron_core.nn.quantize import usage_entropy

SLOT = "audio.codec"
STEPS, ITEMS = 150, 8
DECIBELS = 20 / np.log(10)


def spectrum(audio):
    """(B, K) in nats, of windows of 32 ms."""
    return log_mel(torch.from_numpy(audio.samples), rate=audio.rate, window=256)[0]


def distance(first, second):
    """Mean difference of log-mel spectra, in dB."""
    return float((first - second).abs().mean()) * DECIBELS


def train(model, processor, recordings):
    items = [processor.processors[SLOT].load(each) for each in recordings]
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS, pct_start=0.1)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(STEPS):
        rows = rng.integers(len(items), size=ITEMS)
        batch = processor.processors[SLOT].collate([items[row] for row in rows])
        output = model(media={SLOT: batch})
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.after_optimizer_step({SLOT: output.outputs[SLOT]["statistics"]})
    model.eval()


@pytest.mark.slow
def test_digits_of_voices_never_heard_are_reconstructed(compose):
    pytest.importorskip("espeakng_loader", reason="needs xoron-audio[speech]")
    torch.manual_seed(0)
    model, processor = compose("rvq-audio", preset="tiny")
    heard, unheard = (
        [speak(each) for each in utterances(voices, speeds, pitches=(35, 65))]
        for voices, speeds in ((VOICES[:8], (150, 190)), (VOICES[8:], (170,)))
    )
    train(model, processor, heard)
    codes = model.call(SLOT, "encode", **processor.media_batch(SLOT, unheard))
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    mean = torch.cat([spectrum(each) for each in heard], dim=-1).mean(-1, keepdim=True)
    pairs = list(zip(unheard, decoded, strict=True))
    found = np.mean([distance(spectrum(one), spectrum(other)) for one, other in pairs])
    control = np.mean([distance(spectrum(one), mean) for one in unheard])
    entropy = [
        float(usage_entropy(ids[codes.mask].bincount(minlength=256)))
        for ids in codes.ids.unbind(-1)
    ]
    print(
        f"rvq-audio: {found:.1f} dB from the original, mean spectrum {control:.1f} dB; entropy of"
        f" codes {', '.join(f'{value:.2f}' for value in entropy)}"
    )
    assert found < 0.75 * control
    assert min(entropy) > 0.5
