"""Proves that what is made is written under a name of its own, whatever form its part gives it."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from xoron_core.cli.made_media import MadeMedia
from xoron_core.errors import PluginError
from xoron_core.events import MediaOut
from xoron_core.storage import read_tensors


class Recording(NamedTuple):
    samples: np.ndarray
    rate: int


def test_each_medium_has_its_own_names(tmp_path):
    made = MadeMedia()
    pixels = torch.rand(1, 3, 2, 2)
    said = [Recording(np.arange(4, dtype=np.float32)[None], 8000) for _ in range(2)]
    for modality, medium in (("audio", [said[0]]), ("image", pixels), ("audio", said[1])):
        made.add(MediaOut(modality=modality, media=medium, row=0))
    made.write(tmp_path / "made.safetensors")
    found = read_tensors(tmp_path / "made.safetensors")
    fields = {f"audio.{n}.{field}" for n in (0, 1) for field in Recording._fields}
    assert set(found) == {"image.0"} | fields
    assert torch.equal(found["image.0"], pixels)
    assert found["audio.1.samples"].tolist() == [[0, 1, 2, 3]]
    assert int(found["audio.1.rate"]) == 8000
    assert [entry["name"] for entry in made.data()] == list(made.tensors)


def test_what_is_no_array_is_refused():
    with pytest.raises(PluginError, match="audio is made as str, which is no array"):
        MadeMedia().add(MediaOut(modality="audio", media="waves", row=0))
