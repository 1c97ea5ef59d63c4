"""Proves that causal convolutions equal torch's own on padded input, that no output depends on what
comes after it and every output on what ends with it, and that chunks give what the whole gives.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xoron_core.errors import ConfigError, DataError
from xoron_core.nn.causal_conv import CausalConv1d, CausalConvTranspose1d

# kernel size, stride, dilation
DOWN = [(1, 1, 1), (7, 1, 1), (3, 1, 9), (4, 2, 1), (10, 5, 1), (5, 5, 1), (7, 3, 2)]
# kernel size, stride
UP = [(1, 1), (4, 2), (10, 5), (5, 5), (7, 3)]


def down(kernel_size, stride, dilation):
    torch.manual_seed(0)
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    return CausalConv1d(3, 4, **sizes).double()


def up(kernel_size, stride):
    torch.manual_seed(0)
    return CausalConvTranspose1d(3, 4, kernel_size=kernel_size, stride=stride).double()


def signal(length):
    return torch.randn(2, 3, length, generator=torch.Generator().manual_seed(1)).double()


def in_chunks(layer, x, sizes):
    state, pieces = layer.init_state(len(x)), []
    for chunk in x.split(sizes, dim=-1):
        out, state = layer.step(chunk, state)
        pieces.append(out)
    return torch.cat(pieces, dim=-1)


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), DOWN)
def test_a_convolution_equals_torchs_and_ends_with_its_step(kernel_size, stride, dilation):
    layer, T = down(kernel_size, stride, dilation), 12
    x = signal(T * stride)
    span = (kernel_size - 1) * dilation + 1
    padded = F.pad(x, (span - stride, 0))
    expected = F.conv1d(padded, layer.conv.weight, layer.conv.bias, stride, dilation=dilation)
    assert expected.shape[-1] == T
    torch.testing.assert_close(layer(x), expected)
    for t in (0, 5, T - 1):
        changed = x.clone()
        changed[..., (t + 1) * stride :] += 1
        assert torch.equal(layer(changed)[..., : t + 1], layer(x)[..., : t + 1])
        # The last sample of the step is seen, or the layer would lag.
        changed = x.clone()
        changed[..., (t + 1) * stride - 1] += 1
        assert not torch.allclose(layer(changed)[..., t], layer(x)[..., t])


@pytest.mark.parametrize(("kernel_size", "stride"), UP)
def test_a_transposed_convolution_equals_torchs_and_begins_with_its_step(kernel_size, stride):
    layer, T = up(kernel_size, stride), 12
    x = signal(T)
    weight, bias = layer.conv.weight, layer.conv.bias
    expected = F.conv_transpose1d(x, weight, bias, stride)[..., : T * stride]
    assert expected.shape[-1] == T * stride
    torch.testing.assert_close(layer(x), expected)
    for t in (1, 5, T - 1):
        changed = x.clone()
        changed[..., t:] += 1
        difference = (layer(changed) - layer(x)).detach().abs().sum((0, 1))
        assert float(difference[: t * stride].max()) == 0
        assert float(difference[t * stride]) > 0


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), DOWN)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_chunks_of_a_convolution_are_the_whole(kernel_size, stride, dilation, steps):
    layer = down(kernel_size, stride, dilation)
    x = signal(11 * stride)
    torch.testing.assert_close(in_chunks(layer, x, steps * stride), layer(x))


@pytest.mark.parametrize(("kernel_size", "stride"), UP)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_chunks_of_a_transposed_convolution_are_the_whole(kernel_size, stride, steps):
    layer = up(kernel_size, stride)
    x = signal(11)
    torch.testing.assert_close(in_chunks(layer, x, steps), layer(x))


def test_streams_interleave_because_the_state_is_theirs():
    layer, x = down(7, 1, 3), signal(20)
    states = [layer.init_state(1) for _ in x]
    pieces = [[], []]
    for chunk in x.split(4, dim=-1):
        for row in (0, 1):
            out, states[row] = layer.step(chunk[row : row + 1], states[row])
            pieces[row].append(out)
    torch.testing.assert_close(torch.cat([torch.cat(p, -1) for p in pieces]), layer(x))


def test_a_stack_down_and_up_is_as_long_as_its_input_and_streams():
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [
            CausalConv1d(3, 3, kernel_size=7, dilation=2),
            CausalConv1d(3, 3, kernel_size=8, stride=4),
            CausalConv1d(3, 3, kernel_size=10, stride=5),
            CausalConvTranspose1d(3, 3, kernel_size=10, stride=5),
            CausalConvTranspose1d(3, 3, kernel_size=8, stride=4),
        ]
    ).double()
    x = signal(200)

    def through(x):
        for layer in layers:
            x = F.elu(layer(x))
        return x

    states = [layer.init_state(2) for layer in layers]
    pieces = []
    for chunk in x.split(20, dim=-1):
        for index, layer in enumerate(layers):
            out, states[index] = layer.step(chunk, states[index])
            chunk = F.elu(out)
        pieces.append(chunk)
    torch.testing.assert_close(torch.cat(pieces, -1), through(x))
    ragged = through(signal(190))
    assert ragged.shape[-1] == 200


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="a kernel of 3 samples with a stride of 4"):
        CausalConv1d(1, 1, kernel_size=3, stride=4)
    with pytest.raises(ConfigError, match="a stride of 0"):
        CausalConvTranspose1d(1, 1, kernel_size=3, stride=0)
    layer = down(4, 2, 1)
    with pytest.raises(DataError, match="a chunk of 3 samples for a convolution of stride 2"):
        layer.step(signal(3), layer.init_state(2))
