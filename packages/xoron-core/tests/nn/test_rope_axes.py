"""Proves that axial rotary tables rotate: norms stay, scores depend on offsets, axes do not mix.

The formula is checked against complex numbers, one pair at a time.
"""

import cmath

import pytest
import torch

from xoron_core.errors import ConfigError, SequenceError
from xoron_core.nn.rope import apply_rotary, rotary_tables
from xoron_core.nn.rope_axes import axial_tables, axis_widths

THETA = 100.0


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(axes, side=4):
    return torch.cartesian_prod(*[torch.arange(side).float()] * axes).view(1, -1, axes)


def rotated(x, positions, **options):
    return apply_rotary(x, *axial_tables(positions, x.shape[-1], theta=THETA, **options))


@pytest.mark.parametrize(("axes", "dim"), [(2, 16), (3, 24), (3, 64), (2, 6)])
def test_norms_stay_and_scores_depend_on_offsets_alone(axes, dim):
    positions = grid(axes)
    N = positions.shape[1]
    q, k = draw(1, 2, N, dim), draw(1, 2, N, dim, seed=1)
    shift = torch.tensor([3.0, -2.0, 7.0])[:axes]
    here = rotated(q, positions), rotated(k, positions)
    there = rotated(q, positions + shift), rotated(k, positions + shift)
    torch.testing.assert_close(here[0].norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    scores = [a @ b.transpose(-1, -2) for a, b in (here, there)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-5)
    for axis in range(axes):  # and they do depend on the offset of every axis
        one = torch.zeros(axes)
        one[axis] = 1.0
        moved = here[0] @ rotated(k, positions + one).transpose(-1, -2)
        assert (moved - scores[0]).abs().max() > 0.1


@pytest.mark.parametrize("widths", [None, (4, 12)])
def test_each_pair_is_multiplied_by_a_unit_complex_number(widths):
    dim, half = 16, 8
    x, positions = draw(1, 1, 5, dim), draw(1, 5, 2, seed=2).float() * 9
    got = rotated(x, positions, widths=widths)
    pairs = [(axis, i, w) for axis, w in enumerate(widths or (8, 8)) for i in range(w // 2)]
    for n in range(5):
        for pair, (axis, i, width) in enumerate(pairs):
            angle = float(positions[0, n, axis]) * THETA ** (-2 * i / width)
            want = complex(x[0, 0, n, pair], x[0, 0, n, pair + half]) * cmath.exp(1j * angle)
            have = complex(got[0, 0, n, pair], got[0, 0, n, pair + half])
            assert abs(want - have) < 1e-5


def test_one_axis_is_plain_rotary_position():
    positions = torch.arange(7).float().view(1, 7, 1)
    ours = axial_tables(positions, 8, theta=THETA)
    plain = rotary_tables(positions[..., 0], 8, theta=THETA)
    for table, other in zip(ours, plain, strict=True):
        assert torch.equal(table, other)


def test_widths_are_even_and_fill_the_head():
    assert [axis_widths(d, a) for d, a in ((64, 2), (64, 3), (22, 3))] == [
        [32, 32],
        [22, 22, 20],
        [8, 8, 6],
    ]
    for dim, axes in ((7, 2), (4, 3), (2, 2)):
        with pytest.raises(ConfigError, match="cannot turn"):
            axis_widths(dim, axes)
    for widths in ((3, 5), (4, 2), (8,)):
        with pytest.raises(ConfigError, match="do not share 8 dimensions among 2 axes"):
            axial_tables(torch.zeros(1, 2, 2), 8, theta=THETA, widths=widths)
    with pytest.raises(SequenceError, match=r"expected \(B, N, A\)"):
        axial_tables(torch.zeros(1, 2), 8, theta=THETA)
