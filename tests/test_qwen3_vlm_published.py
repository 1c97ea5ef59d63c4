"""Proves Track A at its published size, without network: it is planned with exactly the published
numbers of parameters and has the published shapes.
"""

import pytest
import torch

from xoron_core.components import Context
from xoron_core.composer.composition import read_composition
from xoron_core.composer.planner import plan
from xoron_core.plugins import registry
from xoron_vision.config import SiglipConfig
from xoron_vision.projectors.config import PerceiverMlpConfig
from xoron_vision.projectors.perceiver import PerceiverMlpProjector
from xoron_vision.siglip import SiglipEncoder

SLOT = "image.encoder"


def planned(*overrides, plugins="llm,vision"):
    chosen = registry().select(plugins)
    return plan(read_composition(chosen, preset="qwen3-vlm", overrides=overrides), chosen)


def test_the_published_size_is_planned_offline_and_exact(offline):
    found = {row.slot: row for row in planned("image.projector.vision_norm=false").rows}
    connector, tower = found["image.projector"], found[SLOT]
    assert connector.parameters == connector.trainable == 6_927_872 + 75_517_952 == 82_445_824
    assert (tower.parameters, tower.trainable) == (412_987_248, 0)
    D, F, V, L = 4096, 12_288, 151_936, 36
    layer = 2 * D * D + 2 * D * 1024 + 3 * D * F + 2 * D + 2 * 128
    assert found["backbone"].parameters == L * layer + 2 * V * D + D == 8_190_735_360
    normed = {row.slot: row for row in planned("image.projector.vision_norm=true").rows}
    assert normed["image.projector"].parameters - connector.parameters == 2_304


@pytest.mark.parametrize(
    ("name", "resample"),
    [
        ("google/siglip2-so400m-patch14-384", "bilinear"),
        ("google/siglip-so400m-patch14-384", "bicubic"),
    ],
)
def test_both_published_towers_are_known_by_name(offline, name, resample):

    config = SiglipConfig.parse({"path": name}).resolved()
    assert (config.size, config.patch_size, config.tower["hidden_size"]) == ((384, 384), 14, 1152)
    assert (config.preprocess.resample, config.preprocess.mean) == (resample, (0.5, 0.5, 0.5))


def test_shapes_at_the_published_width():

    config = SiglipConfig.parse({"path": "google/siglip2-so400m-patch14-384"}).resolved()
    sizes = {**config.tower, "num_hidden_layers": 1}
    tower = SiglipEncoder(SiglipConfig.parse({"vision_config": sizes}), Context(SLOT)).eval()
    context = Context("image.projector", feature_size=tower.feature_size, hidden_size=4096)
    connector = PerceiverMlpProjector(PerceiverMlpConfig(), context).eval()
    with torch.no_grad():
        features = tower(pixel_values=torch.zeros(1, 3, 384, 384))
        latents = connector.resampler(features.values, features.mask)
        tokens = connector(features)
    assert features.values.shape == (1, 729, 1152)
    assert latents.shape == (1, 64, 512)
    assert tokens.values.shape == (1, 64, 4096)
    assert torch.equal(tokens.values, connector.write(latents))
