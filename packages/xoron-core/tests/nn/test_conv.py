"""Proves the convolution blocks: where they pad, what attention sees, what starts the shortcut.

Against an independent implementation they are tested in xoron-vision, with diffusers' weights.
"""

import torch
import torch.nn.functional as F
from torch import nn

from xoron_core.nn.conv import AttentionBlock2d, Downsample2d, ResBlock2d, Upsample2d


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_downsampling_sees_nothing_beyond_the_left_and_the_top():
    torch.manual_seed(0)
    block = Downsample2d(4)
    x = noise(2, 4, 6, 8)
    want = F.conv2d(F.pad(x, (0, 1, 0, 1)), block.conv.weight, block.conv.bias, stride=2)
    got = block(x)
    assert got.shape == (2, 4, 3, 4)
    torch.testing.assert_close(got, want)
    # Its first place is a whole 3 by 3 window, its last one touches the padding.
    first = (block.conv.weight * x[0, :, :3, :3]).sum((1, 2, 3)) + block.conv.bias
    torch.testing.assert_close(got[0, :, 0, 0], first)


def test_upsampling_repeats_places_before_it_convolves():
    block = Upsample2d(4)
    x = noise(2, 4, 3, 5)
    torch.testing.assert_close(
        block(x), block.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    )


def test_attention_over_places_is_torchs_of_one_head():
    torch.manual_seed(0)
    block, theirs = AttentionBlock2d(8, norm_groups=2), nn.MultiheadAttention(8, 1)
    projections = (block.q_proj, block.k_proj, block.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        theirs.in_proj_bias.copy_(torch.cat([each.bias for each in projections]))
        theirs.out_proj.load_state_dict(block.o_proj.state_dict())
    x = 3 * noise(2, 8, 3, 4)
    places = block.norm(x).flatten(2).permute(2, 0, 1)
    attended, _ = theirs(places, places, places)
    want = x + attended.permute(1, 2, 0).view_as(x)
    torch.testing.assert_close(block(x), want, rtol=0, atol=1e-5)


def test_a_residual_block_is_its_shortcut_where_its_last_convolution_is_zero():
    for channels, shortcut in ((8, nn.Identity), (16, nn.Conv2d)):
        block = ResBlock2d(8, channels, norm_groups=4)
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        x = noise(2, 8, 5, 5)
        assert isinstance(block.shortcut, shortcut)
        torch.testing.assert_close(block(x), block.shortcut(x))
        nn.init.ones_(block.conv2.bias)
        torch.testing.assert_close(block(x), block.shortcut(x) + 1)
