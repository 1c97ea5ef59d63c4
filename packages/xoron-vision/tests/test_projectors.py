"""Proves the projectors: torch image by image as oracle, exact counts, budgets that are prefixes.

Batches hold images of different grids with garbage in their padding.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from xoron_core.components import Context, Features
from xoron_core.errors import CompositionError, ConfigError, SequenceError
from xoron_vision.projectors import config as c
from xoron_vision.projectors.base import grid_of
from xoron_vision.projectors.c_abstractor import CAbstractorProjector, adaptive_pool, canvas
from xoron_vision.projectors.perceiver import PerceiverMlpProjector, PerceiverProjector
from xoron_vision.projectors.simple import MlpProjector, PixelShuffleProjector, SpatialProjector

GRIDS = [(4, 4), (2, 6), (6, 2), (2, 2)]
SMALL = {"num_tokens": 8, "hidden_size": 16, "num_heads": 2, "num_layers": 2, "head_dim": 8}


@pytest.fixture
def make(build):
    def made(cls, config_cls, **data):
        return build(cls, config_cls, data, backbone_size=24, feature_size=8)

    return made


def image(features, index):
    """One image's features as a picture (1, E, h, w), made without the code under test."""
    h, w = GRIDS[index]
    return rearrange(features.values[index, : h * w], "(h w) e -> 1 e h w", h=h)


def test_pixel_shuffle_is_torchs_unshuffle_of_every_image(make, features):
    part, given = make(PixelShuffleProjector, c.GroupConfig, factor=2), features(*GRIDS)
    got = part(given)
    for i, (h, w) in enumerate(GRIDS):
        # torch orders channels (e, a, b), here they are (a, b, e).
        shuffled = rearrange(
            F.pixel_unshuffle(image(given, i), 2), "1 (e a b) h w -> (h w) (a b e)", a=2, b=2
        )
        valid = got.mask[i]
        assert valid.sum() == h * w // 4 == part.num_positions(part.config, h * w)
        torch.testing.assert_close(got.values[i][valid], part.mlp(shuffled), rtol=0, atol=1e-6)


def test_spatial_is_torchs_average_pooling_of_every_image(make, features):
    part, given = make(SpatialProjector, c.GroupConfig, factor=2), features(*GRIDS)
    got = part(given)
    for i, (h, w) in enumerate(GRIDS):
        pooled = rearrange(F.avg_pool2d(image(given, i), 2), "1 e h w -> (h w) e")
        valid = got.mask[i]
        assert valid.sum() == h * w // 4 == part.num_positions(part.config, h * w)
        torch.testing.assert_close(got.values[i][valid], part.mlp(pooled), rtol=0, atol=1e-6)


def test_pooling_of_the_c_abstractor_is_torchs_adaptive_one(features):
    given = features(*GRIDS, (3, 5))
    grid = grid_of(given, "x")
    laid, valid = canvas(given, grid)
    assert valid.flatten(1).sum(1).tolist() == [h * w for h, w in [*GRIDS, (3, 5)]]
    for side in (1, 2, 3):
        got = adaptive_pool(laid, grid, side)
        for i, (h, w) in enumerate([*GRIDS, (3, 5)]):
            picture = rearrange(given.values[i, : h * w], "(h w) e -> 1 e h w", h=h)
            want = rearrange(F.adaptive_avg_pool2d(picture, side), "1 e h w -> h w e")
            torch.testing.assert_close(got[i], want, rtol=0, atol=1e-6)


PARTS = {
    "mlp": (MlpProjector, c.MlpConfig, {}),
    "pixel-shuffle": (PixelShuffleProjector, c.GroupConfig, {}),
    "spatial": (SpatialProjector, c.GroupConfig, {}),
    "c-abstractor": (
        CAbstractorProjector, c.CAbstractorConfig,
        {"num_tokens": 4, "hidden_size": 16, "depth": 2},
    ),
    "perceiver": (PerceiverProjector, c.PerceiverConfig, SMALL),
    "perceiver-mlp": (PerceiverMlpProjector, c.PerceiverMlpConfig, SMALL),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_an_image_is_the_same_alone_and_beside_others(make, features, name):
    cls, config_cls, data = PARTS[name]
    part, given = make(cls, config_cls, **data), features(*GRIDS)
    together = part(given)
    assert together.values.shape[-1] == 24
    for i, (h, w) in enumerate(GRIDS):
        n = h * w
        alone = part(Features(*(t[i : i + 1, :n] for t in given)))
        count = part.num_positions(part.config, n)
        assert int(together.mask[i].sum()) == count == alone.values.shape[1]
        torch.testing.assert_close(together.values[i, :count], alone.values[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "first"), list(itertools.product(PARTS, [0, 3])))
def test_every_feature_counts(make, features, name, first):
    cls, config_cls, data = PARTS[name]
    part, given = make(cls, config_cls, **data), features((4, 4))
    values = given.values.clone().requires_grad_(True)
    part(given._replace(values=values)).values[:, first:].square().sum().backward()
    reached = values.grad[0].abs().sum(-1) > 0
    if name in ("mlp", "pixel-shuffle", "spatial"):  # what lies in other squares does not
        assert reached.any()
        assert bool(reached.all()) is (first == 0)
    else:
        assert reached.all()


def test_grids_that_do_not_divide_are_refused_with_their_sides(make, features):
    part = make(SpatialProjector, c.GroupConfig, factor=2)
    with pytest.raises(SequenceError, match=r"a grid of 4 x 3 patches .* squares of 2"):
        part(features((2, 2), (4, 3)))
    with pytest.raises(SequenceError, match="15 patches do not divide"):
        part.num_positions(part.config, 15)
    with pytest.raises(CompositionError, match=r"use projector: \{use: perceiver\}"):
        part(features((2, 2))._replace(positions=None))
    broken = features((2, 2))
    broken.positions[0, 3, 0] = 4.0
    with pytest.raises(SequenceError, match="no whole grid"):
        part(broken)


def test_track_a_has_exactly_the_published_parameters_and_shapes():
    def connector(**data):
        config = c.PerceiverMlpConfig.parse(data)
        return PerceiverMlpProjector(
            config, Context("image.projector", hidden_size=4096, feature_size=1152)
        )

    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        part = connector()
        features = Features(torch.zeros(3, 729, 1152), torch.ones(3, 729, dtype=torch.bool))
        latents = part.resampler(features.values, features.mask)
        tokens = part(features)
        normed = connector(vision_norm=True)
    L, H, R, E = 64, 4096, 512, 1152
    layer = 4 * (R * R + R) + 4 * R + (8 * R * R + 5 * R)
    assert count(part.resampler) == L * R + (E + 1) * R + 2 * layer == 6_927_872
    assert count(part.write) == (R + 1) * 4 * H + (4 * H + 1) * H == 75_517_952
    assert count(part) == 82_445_824
    assert count(normed) - count(part) == 2304
    assert (features.values.shape, latents.shape, tokens.values.shape) == (
        (3, 729, 1152),
        (3, 64, 512),
        (3, 64, 4096),
    )


E, D, W = 1152, 4096, 1024  # features of so400m, the backbone, the c-abstractor
AFFINE = {  # parameters of a linear layer from a width to a width
    "features to D": (E + 1) * D,
    "D to D": (D + 1) * D,
    "squares to D": (9 * E + 1) * D,
}


@pytest.mark.parametrize(
    ("cls", "config", "positions", "count"),
    [
        (MlpProjector, c.MlpConfig(), 729, AFFINE["features to D"] + AFFINE["D to D"]),
        (
            PixelShuffleProjector, c.GroupConfig(factor=3), 81,
            AFFINE["squares to D"] + AFFINE["D to D"],
        ),
        (
            SpatialProjector, c.GroupConfig(factor=3), 81,
            AFFINE["features to D"] + AFFINE["D to D"],
        ),
        (
            # Latents and two layers: q, k, v, o; gate, up, down of 4 E; three norms. A last norm.
            PerceiverProjector, c.PerceiverConfig(), 64,
            64 * E + 2 * (4 * E * E + 3 * 4 * E * E + 3 * E) + E + AFFINE["features to D"],
        ),
    ],
)  # fmt: skip
def test_projectors_have_their_closed_form_sizes_and_shapes_at_the_published_widths(
    cls, config, positions, count
):
    with torch.device("meta"):
        part = cls(config, Context("image.projector", hidden_size=D, feature_size=E))
        grid = torch.zeros(2, 729, 2)
        features = Features(torch.zeros(2, 729, E), torch.ones(2, 729, dtype=torch.bool), grid)
        made = part(features)
    assert sum(p.numel() for p in part.parameters()) == count
    assert made.values.shape == (2, positions, D)
    assert part.num_positions(part.config, 729) == positions


@pytest.mark.parametrize("name", ["perceiver", "perceiver-mlp"])
def test_a_smaller_budget_gives_the_first_positions_of_the_whole(make, features, name):
    cls, config_cls, data = PARTS[name]
    given = features(*GRIDS)
    part = make(cls, config_cls, **data, budgets=[2, 4, 8])
    whole = part(given).values
    for budget in (2, 4, 8):
        less = make(cls, config_cls, **data, budgets=[2, 4, 8], budget=budget)
        got = less(given)
        assert got.mask.shape == (4, budget)
        assert less.num_positions(less.config, 729) == budget
        torch.testing.assert_close(got.values, whole[:, :budget], rtol=0, atol=1e-5)
    counts = torch.tensor([1, 4, 2, 3])
    mixed = part(given, counts=counts)
    assert mixed.mask.sum(-1).tolist() == counts.tolist()
    torch.testing.assert_close(mixed.values, whole[:, :4], rtol=0, atol=1e-5)
    for wrong in ([9, 1, 1, 1], [0, 1, 1, 1]):
        with pytest.raises(SequenceError, match="this projector makes 1 to 8"):
            part(given, counts=torch.tensor(wrong))


def test_without_budgets_latents_see_those_behind_them(make, features):
    part = make(PerceiverProjector, c.PerceiverConfig, **SMALL)
    given = features(*GRIDS)
    apart = part(given, counts=torch.full((4,), 4)).values - part(given).values[:, :4]
    assert apart.abs().max() > 1e-4


def test_training_on_drawn_prefixes_makes_short_budgets_useful(make, features):
    """Latents must carry a vector; trained on all 8 only, one alone says less of it."""

    def error_of_one(draw):
        torch.manual_seed(0)
        part = make(PerceiverProjector, c.PerceiverConfig, **SMALL, budgets=[1, 8]).train()
        optimizer = torch.optim.Adam(part.parameters(), lr=3e-3)
        rng = torch.Generator().manual_seed(0)
        mask = torch.ones(32, 1, dtype=torch.bool)
        for _ in range(150):
            target = torch.randn(32, 1, 8, generator=rng)
            count = 1 if draw and torch.rand((), generator=rng) < 0.5 else 8
            made = part(Features(target, mask), counts=torch.full((32,), count)).values
            loss = (made.mean(1)[:, :8] - target[:, 0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        target = torch.randn(256, 1, 8, generator=rng)
        with torch.no_grad():
            one = part(
                Features(target, torch.ones(256, 1, dtype=torch.bool)),
                counts=torch.ones(256, dtype=torch.int64),
            ).values
        return float((one[:, 0, :8] - target[:, 0]).square().mean())

    drawn, whole = error_of_one(True), error_of_one(False)
    assert drawn < 0.5 * whole, (drawn, whole)


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (c.CAbstractorConfig, {"num_tokens": 60}, "no square number"),
        (c.PerceiverConfig, {"budgets": [16, 65]}, "65 is more than num_tokens 64"),
        (c.PerceiverMlpConfig, {"budget": 100}, "100 is more than num_tokens 64"),
        (c.GroupConfig, {"factor": 0}, "factor"),
    ],
)
def test_configs_that_make_no_sense_say_what_to_write(cls, data, message):
    with pytest.raises(ConfigError, match=message):
        cls.parse(data)


def test_without_a_backbone_results_are_as_wide_as_the_config_says_or_the_features():
    for data, width in (({}, 8), ({"output_size": 40}, 40)):
        part = MlpProjector(c.MlpConfig.parse(data), Context("p", feature_size=8))
        assert part.output_size == width
    wide = Context("p", feature_size=8, hidden_size=16)
    assert MlpProjector(c.MlpConfig.parse({"output_size": 40}), wide).output_size == 16
