"""Proves what the kit cannot: series of any size come back, text and series meet in one model."""

import numpy as np
import pytest
import torch
import xoron_core
from xoron_core.errors import DataError
from xoron_core.events import MediaOut
from xoron_core.session import Session

from xoron_timeseries.parts import split
from xoron_timeseries.series import load

WAVE = np.sin(np.arange(40) / 3)


@pytest.fixture(scope="module")
def codec():
    model, processor = xoron_core.compose({"series": {"codec": {"use": "timeseries"}}})
    return model.part("series.codec"), processor


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 250.0, 1e30])
def test_series_of_any_size_come_back_within_half_a_step(codec, size):
    part, processor = codec
    batch = processor.media_batch("series.codec", [size * WAVE])
    codes = part.encode(**batch)
    exponent = int(codes.ids[0, 0]) - 128
    error = (part.decode(codes.ids, codes.metadata) - batch["values"]).abs().max()
    assert size / 2 <= 2.0**exponent <= 2 * size
    assert error <= 1.001 * 2.0**exponent / 255


def test_a_power_of_two_changes_the_exponent_alone():
    values = torch.from_numpy(load(WAVE))[None]
    exponents, mantissas = split(values)
    larger, same = split(values * 2**9)
    assert larger.equal(exponents + 9)
    assert same.equal(mantissas)


def test_files_bytes_lists_and_arrays_are_the_same_series(tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("day,value\n1,0.5\n2,-3\n3,7e2\n")
    for source in (path, str(path), path.read_bytes(), [0.5, -3, 700], np.array([0.5, -3, 700])):
        assert load(source).tolist() == [0.5, -3.0, 700.0]


@pytest.mark.filterwarnings("ignore:genfromtxt")
@pytest.mark.parametrize("source", ["missing.csv", b"", b"day,value\n1,?\n", [], [1, None], "a,b"])
def test_what_is_no_series_is_one_message(source):
    with pytest.raises(DataError, match="series: "):
        load(source)


@pytest.fixture(scope="module")
def composed():
    pytest.importorskip("xoron_llm", reason="text needs xoron-llm")
    small = ["backbone.num_layers=2", "backbone.use_moe=false"]
    return xoron_core.compose(preset="tiny", plugins=["llm", "timeseries"], overrides=small)


def ask(values, **part):
    content = [{"type": "series", "series": values, **part}, {"type": "text", "text": "go on"}]
    return {"role": "user", "content": content}


@pytest.mark.parametrize("route", ["encoder", "codec"])
def test_what_goes_in_changes_what_comes_out(composed, route):
    model, processor = composed
    with torch.no_grad():
        logits = [
            model(**processor([ask(values, route=route)])).logits for values in (WAVE, WAVE[::-1])
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_a_series_in_and_out_trains_encoder_projector_and_backbone(composed):
    model, processor = composed
    model.train()
    answer = {"role": "assistant", "content": [{"type": "series", "series": WAVE}]}
    model(**processor([ask(WAVE), answer], train=True)).loss.backward()
    model.eval()
    for slot in ("series.encoder", "series.projector", "backbone"):
        assert all(p.grad is not None and p.grad.any() for p in model.part(slot).parameters()), slot


def test_random_weights_generate_a_series(composed):
    events = list(Session(*composed).stream([ask(WAVE)], begin_with="series", max_new_tokens=80))
    made = [event for event in events if isinstance(event, MediaOut)]
    assert made
    for event in made:
        assert event.modality == "series"
        assert 1 <= event.media.shape[-1] <= 64
        assert torch.isfinite(event.media).all()
