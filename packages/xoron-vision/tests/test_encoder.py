"""Proves the compression encoder: torch's and diffusers' blocks as oracles, sizes, positions."""

import pytest
import torch
from torch import nn

from xoron_core.components import Context
from xoron_core.errors import ConfigError
from xoron_vision.config import XoronVisionConfig
from xoron_vision.encoder import XoronVisionEncoder
from xoron_vision.image import load_image, sample_image

SIZES = {"num_latents": 5, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


@pytest.fixture
def make(build, native):
    def made(tower=native, **changes):
        data = {**SIZES, **changes, "tower": {"vision_config": tower}}
        return build(XoronVisionEncoder, XoronVisionConfig, data)

    return made


def batch_of(part, *sizes):
    processor = part.processor(part.config)
    items = [processor.load(load_image(sample_image(i, size))) for i, size in enumerate(sizes)]
    assert {processor.num_positions(item) for item in items} == {5}
    return processor.collate(items)


def test_compression_is_torchs_encoder_on_patches_and_latents_where_nothing_turns(make):
    part = make(dual_stream_layers=0, rope_theta=100.0)
    batch = batch_of(part, 1)
    with torch.no_grad():
        seen = part.tower(**batch)
        sequence = torch.cat((part.input_proj(seen.values), part.latents[None]), dim=1)
        for block in part.compression:
            sequence = _oracle(block.streams[0], 16, 2)(sequence)
        want = part.norm(sequence[:, -5:])
        part.tower.forward = lambda **_: seen._replace(positions=torch.zeros_like(seen.positions))
        still = part(**batch)
        part.tower.forward = lambda **_: seen
        turned = part(**batch)
    torch.testing.assert_close(still.values, want, rtol=0, atol=1e-5)
    assert (turned.values - want).abs().max() > 1e-3


def _oracle(stream, size, heads):
    layer = nn.TransformerEncoderLayer(
        size, heads, 4 * size, 0.0, "gelu", batch_first=True, norm_first=True
    )
    layer.norm1, layer.norm2, layer.linear1, layer.linear2 = (
        stream.norm1, stream.norm2, stream.fc1, stream.fc2,
    )  # fmt: skip
    parts = (stream.q_proj, stream.k_proj, stream.v_proj)
    layer.self_attn.in_proj_weight = nn.Parameter(torch.cat([p.weight for p in parts]))
    layer.self_attn.in_proj_bias = nn.Parameter(torch.cat([p.bias for p in parts]))
    layer.self_attn.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(size, size)
    layer.self_attn.out_proj.load_state_dict(stream.o_proj.state_dict())
    return layer.eval()


def test_the_dual_stream_is_diffusers_joint_transformer_where_nothing_turns(make):
    attention = pytest.importorskip("diffusers.models.attention", reason="needs diffusers")
    part = make(num_layers=0, dual_stream_layers=3, num_latents=5)
    with torch.no_grad():
        seen = part.tower(**batch_of(part, 1))
        patches, latents = part.input_proj(seen.values), part.latents[None]
        for block in part.dual_stream:
            patches, latents = _joint_oracle(attention, block)(
                latents, patches, temb=torch.zeros(1, 16)
            )
        want = part.norm(latents)
        part.tower.forward = lambda **_: seen._replace(positions=torch.zeros_like(seen.positions))
        still = part(x=torch.zeros(1))
    assert patches is None  # nobody reads them behind the last block, theirs neither
    torch.testing.assert_close(still.values, want, rtol=0, atol=1e-5)


def _joint_oracle(attention, block, size=16, heads=2):
    """diffusers' block of Stable Diffusion 3 with the weights of ours.

    Its norms take shift and scale from a time embedding: of a zero embedding the bias is left.
    """
    mine, other = block.streams
    made = attention.JointTransformerBlock(
        size, heads, size // heads, context_pre_only=not other.written, qk_norm="rms_norm"
    )
    made.norm1.norm.eps = made.norm2.eps = made.norm1_context.norm.eps = 1e-5
    ones = torch.ones(size)

    def modulation(stream):
        both = (stream.norm1.bias, stream.norm1.weight - 1, ones)
        return torch.cat((*both, stream.norm2.bias, stream.norm2.weight - 1, ones))

    def feed_forward(stream):
        made = attention.FeedForward(dim=size, dim_out=size, activation_fn="gelu")
        made.net[0].proj, made.net[2] = stream.fc1, stream.fc2
        return made

    attn = made.attn
    attn.to_q, attn.to_k, attn.to_v, attn.to_out[0] = (
        mine.q_proj, mine.k_proj, mine.v_proj, mine.o_proj,
    )  # fmt: skip
    attn.norm_q.weight, attn.norm_k.weight = mine.q_norm.weight, mine.k_norm.weight
    attn.add_k_proj, attn.add_v_proj = other.k_proj, other.v_proj
    attn.norm_added_k.weight = other.k_norm.weight
    made.norm1.linear.bias = nn.Parameter(modulation(mine))
    made.ff = feed_forward(mine)
    if other.written:
        attn.add_q_proj, attn.to_add_out = other.q_proj, other.o_proj
        attn.norm_added_q.weight = other.q_norm.weight
        made.norm1_context.linear.bias = nn.Parameter(modulation(other))
        made.norm2_context.eps = 1e-5
        made.ff_context = feed_forward(other)
    else:
        both = torch.cat((other.norm1.weight - 1, other.norm1.bias))
        made.norm1_context.linear.bias = nn.Parameter(both)
    return made.eval()


@pytest.mark.parametrize("changes", [{"num_layers": 0}, {"dual_stream_layers": 0}])
def test_both_stages_tell_rows_from_columns(make, changes):
    part = make(**changes)
    with torch.no_grad():
        seen = part.tower(**batch_of(part, 1))

        def latents(positions):
            part.tower.forward = lambda **_: seen._replace(positions=positions)
            return part(x=torch.zeros(1)).values

        plain = latents(seen.positions)
        moved = latents(seen.positions.flip(-1))
        assert (moved - plain).abs().max() > 1e-3


def test_images_of_every_shape_give_the_same_alone_and_together(make):
    part = make()
    with torch.no_grad():
        together = part(**batch_of(part, 1, 2, 3))
        assert together.values.shape == (3, 5, 16)
        assert together.mask.all()
        processor = part.processor(part.config)
        for i, size in enumerate((1, 2, 3)):
            item = processor.load(load_image(sample_image(i, size)))
            alone = part(**processor.collate([item])).values[0]
            torch.testing.assert_close(together.values[i], alone, rtol=0, atol=1e-5)
    assert (together.values[0] - together.values[1]).abs().max() > 1e-3


def test_dual_stream_reads_the_patches_and_trains_all_of_its_weights(make):
    part = make(num_layers=0)
    part.train()
    batch = batch_of(part, 1, 2)
    part(**batch).values.square().sum().backward()
    silent = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert "streams.1.fc2.weight" in dict(part.dual_stream[0].named_parameters())
    assert "streams.1.fc2.weight" not in dict(part.dual_stream[1].named_parameters())


def test_a_frozen_tower_takes_no_part_in_training(make):
    part = make(freeze_tower=True)
    part.train()
    part(**batch_of(part, 1)).values.square().sum().backward()
    assert all(p.grad is None for p in part.tower.parameters())
    assert all(p.grad is not None for n, p in part.named_parameters() if "tower" not in n)


def test_the_published_encoder_has_its_size_by_closed_form():
    from importlib import resources

    import yaml

    preset = resources.files("xoron_vision").joinpath("presets/xoron-vision-xoron-dev.yaml")
    config = XoronVisionConfig.parse(yaml.safe_load(preset.read_text())).resolved()
    with torch.device("meta"):
        part = XoronVisionEncoder(config, Context("image.encoder"))
        features = part(**part.dummy_batch())
    assert features.values.shape == (1, 256, 512)
    D = 512
    attention, feed, norms = 4 * (D * D + D), 8 * D * D + 5 * D, 4 * D
    block = attention + feed + norms
    first = 2 * (block + 2 * (D // 8))  # each stream's query and key norms
    last = block + 2 * (D // 8) + 2 * (D * D + D) + 2 * D + D // 8
    rest = (1152 + 1) * D + 256 * D + 2 * D
    want = 412_987_248 + 8 * block + first + last + rest
    assert sum(p.numel() for p in part.parameters()) == want


def test_what_does_not_fit_is_refused(native):
    tower = {"vision_config": native}
    for changes, message in (
        ({"hidden_size": 20, "num_heads": 4}, r"multiple of 4 \* num_heads \(16\)"),
        ({"num_layers": 0, "dual_stream_layers": 0}, "latents see nothing"),
        ({"tower": {}}, "needs path"),
    ):
        with pytest.raises(ConfigError, match=message):
            XoronVisionConfig.parse({"tower": tower, **changes})
