"""Proves the convolutional encoder: torch's own operations as oracle, its grid, its sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xoron_core.errors import ConfigError
from xoron_vision.config import ConvVitConfig
from xoron_vision.conv import ConvVitEncoder
from xoron_vision.image import load_image, sample_image

SIZES = {"image_size": 32, "widths": [8, 16], "num_heads": 2, "norm_groups": 4}


@pytest.fixture
def make(build):
    return lambda **changes: build(ConvVitEncoder, ConvVitConfig, {**SIZES, **changes})


def plain_stem(part, pixels):
    """The same convolutions, written out."""
    x = pixels
    for conv, norm in zip(part.stem[::3], part.stem[1::3], strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=conv.weight.shape[-1] // 2)
        x = F.gelu(F.group_norm(x, 4, norm.weight, norm.bias))
    h, w = x.shape[-2:]
    return x.flatten(2).transpose(1, 2) + torch.stack(
        [plain_waves(row, column, x.shape[1]) for row in range(h) for column in range(w)]
    )


def plain_waves(row, column, width):
    """Sines of the row, sines of the column, then the cosines, from fast to slow."""
    speeds = [100 ** -(i / (width // 4 - 1)) for i in range(width // 4)]
    angles = [place * speed for place in (row, column) for speed in speeds]
    return 0.3 * torch.tensor([wave(a) for wave in (math.sin, math.cos) for a in angles])


def test_it_is_the_written_out_convolutions_and_torchs_encoder_layer(make):
    """Behind one square nothing turns, so the layer is the textbook one."""
    part = make(image_size=4, num_layers=1)
    pixels = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    stream = part.layers[0].streams[0]
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True
    ).eval()
    attention = layer.self_attn
    with torch.no_grad():
        inner = (stream.q_proj, stream.k_proj, stream.v_proj)
        attention.in_proj_weight.copy_(torch.cat([p.weight for p in inner]))
        attention.in_proj_bias.copy_(torch.cat([p.bias for p in inner]))
        attention.out_proj.load_state_dict(stream.o_proj.state_dict())
        layer.norm1, layer.norm2 = stream.norm1, stream.norm2
        layer.linear1, layer.linear2 = stream.fc1, stream.fc2
        want = part.norm(layer(plain_stem(part, pixels)))
        got = part(pixel_values=pixels)
    assert got.values.shape == (3, 1, 16)
    torch.testing.assert_close(got.values, want, rtol=0, atol=1e-5)


def test_a_grid_is_the_stem_row_by_row(make):
    part = make(num_layers=0)
    pixels = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = part(pixel_values=pixels)
        want = part.norm(plain_stem(part, pixels))
    torch.testing.assert_close(got.values, want, rtol=0, atol=1e-5)
    assert got.positions[0].long().tolist() == [[row, col] for row in range(8) for col in range(6)]


def test_layers_know_where_a_square_is(make):
    part = make(num_layers=1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with_places = part(pixel_values=pixels).values
        part.config = part.config.model_copy(update={"rope_theta": 1e12})
        almost_without = part(pixel_values=pixels).values
    assert (with_places - almost_without).abs().max() > 1e-3


def test_the_processor_counts_what_the_encoder_makes(make):
    part = make(num_layers=1)
    processor = part.processor(part.config)
    items = [processor.load(load_image(sample_image(i, size))) for i, size in enumerate((1, 3))]
    features = part(**processor.collate(items))
    assert [processor.num_positions(item) for item in items] == features.mask.sum(-1).tolist()
    assert features.values.shape == (2, 64, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "widths is empty"),
        ({"image_size": 30}, "must be a multiple of 4"),
        ({"widths": [6, 16]}, r"widths \[6\] are no multiples of norm_groups 4"),
        ({"num_heads": 8}, "must be a multiple of 4 \\* num_heads"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        ConvVitConfig.parse({**SIZES, **changes})
