"""Proves that recordings live in a model's one token space: one in a message becomes exactly its
codec's ids where it stands, and what a model makes is a recording. Needs xoron-llm.
"""

import numpy as np
import pytest
import torch

import xoron_core
from xoron_audio.audio import Audio, sample_audio
from xoron_core.events import MediaOut
from xoron_core.flattening import CodeLayout
from xoron_core.media import write_codes
from xoron_core.session import Session

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
SLOT, HOP, Q = "audio.codec", 160, 3
NAMES = [f"xoron-audio/rvq-audio:{q}" for q in range(Q)]


@pytest.fixture(params=["interleaved", "delay"])
def speaking(request):
    """A model that hears and speaks at most 10 frames."""
    data = {
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
        "audio": {
            "codec": {
                "use": "rvq-audio", "preset": "tiny", "pattern": request.param, "max_seconds": 0.2,
            }
        },
    }  # fmt: skip
    model, processor = xoron_core.compose(data, plugins="llm,audio")
    return model.eval(), processor


def heard(*recordings):
    content = [{"type": "text", "text": "compare "}]
    content += [{"type": "audio", "audio": recording} for recording in recordings]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "alike"}]


def test_recordings_become_their_ids_where_they_stand(speaking):
    model, processor = speaking
    recordings = [sample_audio(1, 2), sample_audio(2, 1)]
    batch = processor([heard(*recordings)])
    ids, _ = write_codes(model, batch["media"], batch["input_ids"])
    layout = CodeLayout(model.space, NAMES)
    spans = batch["media"][SLOT]["spans"].tolist()
    assert len(spans) == 2
    for (row, start, length), recording in zip(spans, recordings, strict=True):
        codes = model.call(SLOT, "encode", **processor.media_batch(SLOT, [recording]))
        assert length == codes.ids[0].numel()
        body = ids[row, start : start + length]
        assert torch.equal(layout.unflatten(body), codes.ids[0])
        strings = {model.space.id_of("<|audio|>"), model.space.id_of("<|/audio|>")}
        assert {int(ids[row, start - 1]), int(ids[row, start + length])} == strings


def test_what_a_model_makes_is_a_recording_that_it_can_hear(speaking):
    model, processor = speaking
    session = Session(model, processor)
    ask = [{"role": "user", "content": "say something"}]
    made = [
        event.media
        for event in session.stream(ask, begin_with="audio", max_new_tokens=120)
        if isinstance(event, MediaOut)
    ]
    assert made
    for (audio,) in made:
        assert isinstance(audio, Audio)
        assert audio.rate == 8000
        assert audio.samples.shape[-1] in range(HOP, 10 * HOP + 1, HOP)
        assert np.isfinite(audio.samples).all()
        batch = processor([heard(audio)])
        assert batch["media"][SLOT]["spans"][0, 2] == audio.samples.shape[-1] // HOP * Q
