"""Proves the quantisers: FSQ and a codebook's moving averages equal an independent implementation,
a residual quantiser equals a plain loop, what several passes observed adds up to what one pass over
all would have, dead codes come back to life, and half precision changes no index.

Where we differ from vector-quantize-pytorch on purpose: a code is dead below a share of an even use
(theirs: below a number per step), it restarts with the weight of an even use (theirs: with that
number), a new codebook counts as unused (theirs: as used once), and the gradient passes straight
through (theirs: rotated, unless told otherwise).
"""

import pytest
import torch
import torch.nn.functional as F

from xoron_core.errors import ConfigError
from xoron_core.nn.quantize import ResidualQuantizer, VectorQuantizer, usage_entropy
from xoron_core.nn.quantize_fsq import FSQ

LEVELS = ([8, 8, 8, 16], [8, 5, 5, 5], [3], [7, 5, 5, 5, 5], [4, 3])


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def add(*statistics):
    return {name: sum(each[name] for each in statistics) for name in statistics[0]}


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_equals_the_oracle(levels):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels))
    ours = FSQ(levels)
    every = torch.arange(ours.num_codes)
    codes = ours.indices_to_codes(every)
    assert torch.equal(codes, theirs.indices_to_codes(every))
    assert torch.equal(ours.codes_to_indices(codes), every)
    inputs = [draw(4, 500, len(levels), scale=2.0).requires_grad_() for _ in range(2)]
    found, (values, indices) = ours(inputs[0]), theirs(inputs[1])
    assert torch.equal(found.indices, indices.long())
    assert found.indices.dtype == torch.int64
    assert torch.equal(found.codes, values)
    weights = draw(*values.shape, seed=1)
    (found.codes * weights).sum().backward()
    (values * weights).sum().backward()
    assert inputs[0].grad.any()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_fsq_reaches_every_code_and_never_leaves_them():
    fsq = FSQ([5, 4, 3])
    indices = fsq(draw(20_000, 3, scale=3.0)).indices
    assert torch.equal(indices.unique(), torch.arange(60))
    assert set(fsq(torch.tensor([[-1e6] * 3, [1e6] * 3])).indices.tolist()) == {0, 59}


def test_fsq_levels_out_of_range_are_refused():
    for levels in ([], [8, 2], [300]):
        with pytest.raises(ConfigError, match="from 3 to 256"):
            FSQ(levels)


@pytest.mark.parametrize("quantiser", ["fsq", "vq"])
def test_half_precision_gives_the_indices_of_fp32(quantiser):
    made = FSQ([8, 8, 8, 16]) if quantiser == "fsq" else VectorQuantizer(512, 4)
    z = draw(2000, 4).bfloat16()
    expected = made(z.float())
    assert torch.equal(made(z)[1], expected[1])
    assert made(z)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(z.float())[1], expected[1])


def oracle_codebook(book, decay):
    module = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(
        dim=book.dim,
        codebook_size=book.num_codes,
        decay=decay,
        threshold_ema_dead_code=0,
        rotation_trick=False,
    )
    module._codebook.embed.copy_(book.codebook[None])
    module._codebook.embed_avg.copy_(book.codebook[None])
    book.counts.fill_(1.0)
    book.sums.copy_(book.codebook)
    return module.train()


def test_moving_averages_and_commitment_equal_the_oracle():
    torch.manual_seed(0)
    book = VectorQuantizer(16, 5, decay=0.8, restart_below=0.0).train()
    theirs = oracle_codebook(book, 0.8)
    for step in range(6):
        inputs = [draw(3, 40, 5, seed=step).requires_grad_() for _ in range(2)]
        found = book(inputs[0])
        values, indices, loss = theirs(inputs[1])
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.values, values)
        # Their weight of the commitment is 1 unless set.
        torch.testing.assert_close(found.commitment.mean() / 0.25, loss.squeeze())
        weights = draw(*values.shape, seed=99)
        (found.commitment.mean() / 0.25 + (found.values * weights).sum()).backward()
        (loss.squeeze() + (values * weights).sum()).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        before = book.codebook.clone()
        book.update(found.statistics)
        torch.testing.assert_close(book.codebook, theirs._codebook.embed[0])
        assert not torch.equal(book.codebook, before)


def test_forward_changes_nothing_and_observes_only_in_training():
    book = VectorQuantizer(8, 4).train()
    before = {name: tensor.clone() for name, tensor in book.state_dict().items()}
    assert book(draw(50, 4)).statistics["counts"].sum() == 50
    assert all(torch.equal(book.state_dict()[name], tensor) for name, tensor in before.items())
    assert not book.eval()(draw(50, 4)).statistics


def test_micro_batches_add_up_to_one_batch():
    torch.manual_seed(0)
    whole = VectorQuantizer(16, 4, restart_below=0.0).train()
    parts = VectorQuantizer(16, 4, restart_below=0.0).train()
    parts.load_state_dict(whole.state_dict())
    z = draw(96, 4)
    whole.update(whole(z).statistics)
    parts.update(add(*(parts(piece).statistics for piece in z.split([10, 50, 36]))))
    assert whole.counts.any()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor)


def test_padding_is_not_counted():
    book = VectorQuantizer(8, 4).train()
    z, mask = draw(2, 6, 4), torch.arange(6) < torch.tensor([[6], [2]])
    padded, alone = book(z, mask=mask).statistics, book(z[mask]).statistics
    assert all(torch.equal(padded[name], alone[name]) for name in alone)
    nothing = book(z, mask=torch.zeros_like(mask)).statistics
    before = book.codebook.clone()
    book.update(nothing)
    assert torch.equal(book.codebook, before)


@pytest.mark.parametrize("passes", [1, 3, 8, 40, 1000])
def test_candidates_are_inputs_however_many_passes_are_added(passes):
    book = VectorQuantizer(64, 4, num_candidates=256).train()
    inputs = [draw(20, 4, seed=seed) for seed in range(passes)]
    seen = add(*(book(z).statistics for z in inputs))
    lone = seen["candidates"][seen["candidate_counts"] == 1]
    assert 12 <= len(lone) <= 80
    nearest = torch.cdist(lone, torch.cat(inputs)).argmin(-1)
    torch.testing.assert_close(lone, torch.cat(inputs)[nearest])
    if passes > 1:
        assert len(nearest.unique()) > len(lone) // 2


def test_dead_codes_restart_from_inputs():
    torch.manual_seed(0)
    book = VectorQuantizer(32, 2, decay=0.9).train()
    book.codebook.add_(100.0)  # far from every input: all choose the same one
    assert len(book(draw(400, 2)).indices.unique()) == 1
    for step in range(40):
        book.update(book(draw(400, 2, seed=step)).statistics)
    found = book.eval()(draw(4000, 2, seed=77))
    assert len(found.indices.unique()) == 32
    entropy = usage_entropy(found.indices.bincount(minlength=32))
    assert entropy > 0.9
    assert (found.values - draw(4000, 2, seed=77)).square().mean() < 0.1


def test_updates_are_deterministic():
    def run():
        torch.manual_seed(3)
        book = VectorQuantizer(32, 2).train()
        for step in range(5):
            book.update(book(draw(100, 2, seed=step)).statistics)
        return book.codebook

    assert torch.equal(run(), run())


def trained_residual(**options):
    torch.manual_seed(0)
    made = ResidualQuantizer(4, 16, dim=3, decay=0.8, **options).train()
    for step in range(10):
        made.update(made(draw(1, 200, 3, seed=step)).statistics)
    return made


def test_residual_equals_a_plain_loop():
    made = trained_residual().eval()
    z = draw(5, 7, 3, seed=50)
    rest, indices = z, []
    for book in made.quantizers:
        chosen = torch.cdist(rest, book.codebook).argmin(-1)
        rest = rest - F.embedding(chosen, book.codebook)
        indices.append(chosen)
    found = made(z)
    assert torch.equal(found.indices, torch.stack(indices, -1))
    torch.testing.assert_close(found.values, z - rest)
    torch.testing.assert_close(made.lookup(found.indices), z - rest)
    errors = [(made.lookup(found.indices[..., :n]) - z).square().mean() for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)


def test_the_gradient_of_a_residual_quantiser_passes_straight_through():
    z = draw(5, 7, 3, seed=50).requires_grad_()
    weights = draw(5, 7, 3, seed=51)
    (trained_residual()(z).values * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_dropped_codebooks_are_the_last_ones_and_are_not_counted():
    made = trained_residual(dropout=1.0)
    z = draw(64, 7, 3, seed=50)
    found = made(z)
    used = (found.indices >= 0).sum(-1)
    assert set(used.unique().tolist()) == {1, 2, 3, 4}
    assert torch.equal(used, used[:, :1].expand_as(used))
    for depth in (1, 2, 3, 4):
        items = used[:, 0] == depth
        first = ResidualQuantizer(depth, 16, dim=3).eval()
        first.quantizers.load_state_dict(made.quantizers[:depth].state_dict())
        torch.testing.assert_close(found.values[items], first(z[items]).values)
        torch.testing.assert_close(found.commitment[items], first(z[items]).commitment)
        counts = found.statistics[f"{depth - 1}.counts"]
        assert counts.sum() == (used >= depth).sum()
    assert (made.eval()(z).indices >= 0).all()


def test_usage_entropy():
    assert usage_entropy(torch.full((8,), 3.0)) == pytest.approx(1.0)
    assert usage_entropy(torch.tensor([5.0, 0.0, 0.0, 0.0])) == 0.0
    assert usage_entropy(torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert usage_entropy(torch.tensor([5.0])) == 0.0
