"""Proves that the token demo runs from composition to its figures, and that its figures follow what
it is shown. The demo prints what a whole run reaches; docs/log.md has the figures."""

import numpy as np
import pytest
import token_media
import torch

from xoron_core.api import load

pytest.importorskip("sklearn")


def test_it_runs_from_composition_to_its_figures(tmp_path, capsys):
    assert token_media.demo(token_media.TASKS["digits"](), tmp_path, smoke=True) == 0
    said = capsys.readouterr().out
    for word in (*token_media.GOALS, "control"):
        assert word in said
    before, _ = load(tmp_path / "untrained")
    codec, _ = load(tmp_path / "codec/model")
    after, _ = load(tmp_path / "run/model")
    weights = [dict(model.named_parameters()) for model in (before, codec, after)]

    def moved(old, new):
        return {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}

    # Each stage trains its own part and leaves the other bit for bit.
    assert moved(*weights[:2]) == {"image__codec"}
    assert moved(*weights[1:]) == {"backbone"}


def test_what_is_kept_and_made_is_read_from_what_comes_out(tmp_path):
    """A codec that gives back what it was given keeps everything; one that gives noise nothing."""

    class Part:
        config = None

        def ranges(self, config):
            return [type("Range", (), {"size": 4})]

    class Model:
        def __init__(self, noise):
            self.noise = noise

        def part(self, slot):
            return Part()

        def call(self, slot, method, *args, **media):
            if method == "encode":
                self.images = media["pixel_values"]
                ids = torch.arange(len(self.images))[:, None, None] % 4
                # As many places behind the end of an item, which count for nothing.
                ids, mask = torch.cat([ids, 0 * ids], 1), torch.tensor([True, False])
                mask = mask.expand(len(ids), 2)
                return type("Codes", (), {"ids": ids, "mask": mask, "metadata": []})
            return torch.rand(self.images.shape) if self.noise else self.images

    class Processor:
        def media_batch(self, slot, images):
            return {"pixel_values": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255}

    task = token_media.TASKS["digits"]()
    reader = task.reader()
    scores = [
        token_media._kept(task, Model(noise), Processor(), reader=reader, samples=200)
        for noise in (False, True)
    ]
    assert scores[0]["kept"] == 1.0
    assert scores[0]["entropy"] == pytest.approx(1.0)
    assert scores[1]["kept"] < 0.3
