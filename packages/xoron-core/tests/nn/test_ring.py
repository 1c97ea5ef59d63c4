"""Proves that ring attention over 2 and 4 processes is local attention, on every rank.

Forward and gradients to 1e-5 with zig-zag shards, grouped heads, and the full (unmasked) variant;
that every rank does the same work; that next-token losses of shards add up to the sequence's; and
that decoding continues from the cache that a ring prefill leaves.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn

from xoron_core import losses
from xoron_core.errors import SequenceError
from xoron_core.nn import zigzag
from xoron_core.nn.ring import gather, plan, ring_attention

B, H, G, D, N = 2, 4, 2, 8, 48


def _sequence():
    torch.manual_seed(0)
    shapes = [(B, H, N, D), (B, G, N, D), (B, G, N, D), (B, H, N, D)]
    return [torch.randn(shape) for shape in shapes]


def _local(q, k, v, cotangent, *, causal=True):
    """The oracle: one process, torch's public function."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    k, v = (t.repeat_interleave(H // G, 1) for t in inputs[1:])
    out = F.scaled_dot_product_attention(inputs[0], k, v, is_causal=causal)
    return out.detach(), torch.autograd.grad(out, inputs, cotangent)


def _check_attention(rank: int, world: int) -> None:
    *qkv, cotangent = _sequence()
    mine = {"rank": rank, "world_size": world, "dim": 2}
    for causal in (True, False):
        expected, wanted = _local(*qkv, cotangent, causal=causal)
        inputs = [zigzag.shard(t, **mine).requires_grad_() for t in qkv]
        got = ring_attention(*inputs, causal=causal)
        torch.testing.assert_close(got, zigzag.shard(expected, **mine), atol=1e-5, rtol=1e-5)
        grads = torch.autograd.grad(got, inputs, zigzag.shard(cotangent, **mine))
        for gradient, whole in zip(grads, wanted, strict=True):
            right = zigzag.shard(whole, **mine)
            assert right.abs().max() > 0.01
            torch.testing.assert_close(gradient, right, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gather(got.detach(), dim=2), expected, atol=1e-5, rtol=1e-5)


def _check_sub_group(rank: int, world: int) -> None:
    """Two rings of two in four processes, the second one's ranks being 2 and 3."""
    groups = [dist.new_group(list(range(start, start + 2))) for start in range(0, world, 2)]
    group, place = groups[rank // 2], rank % 2
    *qkv, cotangent = _sequence()
    qkv = [t * (1 + rank // 2) for t in qkv]
    mine = {"rank": place, "world_size": 2, "dim": 2}
    expected, wanted = _local(*qkv, cotangent)
    inputs = [zigzag.shard(t, **mine).requires_grad_() for t in qkv]
    got = ring_attention(*inputs, group=group)
    torch.testing.assert_close(got, zigzag.shard(expected, **mine), atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(got, inputs, zigzag.shard(cotangent, **mine))
    for gradient, whole in zip(grads, wanted, strict=True):
        torch.testing.assert_close(gradient, zigzag.shard(whole, **mine), atol=1e-5, rtol=1e-5)


def _check_model(rank: int, world: int) -> None:
    """A loss through embedding, attention and head: parameters' gradients sum to the local ones."""
    torch.manual_seed(3)
    table, head, project = nn.Embedding(30, D), nn.Linear(D, 30), nn.Linear(D, 3 * D)
    ids = torch.randint(0, 30, (B, N))
    documents = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :5] = losses.IGNORE
    parameters = [*table.parameters(), *head.parameters(), *project.parameters()]

    def hidden(x, attend):
        q, k, v = (t.unsqueeze(1) for t in project(table(x)).chunk(3, -1))
        return attend(q, k, v).squeeze(1)

    def local_attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    whole = losses.text_loss(hidden(ids, local_attend), labels, head, head=head)
    wanted = torch.autograd.grad(whole.sum, parameters)
    mine = {"rank": rank, "world_size": world}
    following = zigzag.shard(zigzag.next_labels(labels, documents), **mine)
    predicting = following != losses.IGNORE
    states = hidden(zigzag.shard(ids, **mine), ring_attention)
    term = losses.token_loss(states[predicting], following[predicting], head, head=head)
    grads = torch.autograd.grad(term.sum, parameters)
    for value in (total := [term.sum.detach(), term.count, *grads]):
        dist.all_reduce(value)
    torch.testing.assert_close(total[0], whole.sum.detach(), atol=1e-3, rtol=1e-5)
    assert total[1] == whole.count > 0
    for got, right in zip(total[2:], wanted, strict=True):
        assert right.abs().max() > 0.01
        torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


def _check_cache(rank: int, world: int) -> None:
    """One more token after a ring prefill attends as it would without the ring."""
    q, k, v, _ = _sequence()
    prefill, mine = N - 8, {"rank": rank, "world_size": world, "dim": 2}
    shards = [zigzag.shard(t[:, :, :prefill], **mine) for t in (k, v)]
    places = zigzag.positions(prefill, rank=rank, world_size=world)
    assert torch.equal(shards[0], k[:, :, places])
    assert torch.equal(shards[1], v[:, :, places])
    keys, values = (gather(t, dim=2) for t in shards)
    assert torch.equal(keys, k[:, :, :prefill])
    assert torch.equal(values, v[:, :, :prefill])
    new = slice(prefill, prefill + 1)
    keys, values = torch.cat((keys, k[:, :, new]), 2), torch.cat((values, v[:, :, new]), 2)
    got = F.scaled_dot_product_attention(q[:, :, new], keys, values, enable_gqa=True)
    expected, _ = _local(q, k, v, torch.ones_like(q))
    torch.testing.assert_close(got, expected[:, :, new], atol=1e-5, rtol=1e-5)


CHECKS = (_check_attention, _check_model, _check_cache)


def _worker(rank: int, world: int, folder: str) -> None:
    """Runs all checks in one process of the ring."""
    if world > 1:
        torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    checks = (*CHECKS, _check_sub_group) if world == 4 else CHECKS
    try:
        for check in checks:
            check(rank, world)
    finally:
        dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_ring_of_processes_equals_one(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    if world == 1:
        _worker(0, 1, str(tmp_path))
    else:
        multiprocessing.spawn(_worker, args=(world, str(tmp_path)), nprocs=world, join=True)
    assert len(list(tmp_path.glob("done-*"))) == world


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_rank_does_the_same_work_and_every_pair_is_seen_once(world) -> None:
    length = 2 * world * 6
    n = length // world
    seen, work = torch.zeros(length, length, dtype=torch.int64), []
    for rank in range(world):
        places = zigzag.positions(length, rank=rank, world_size=world)
        before = int(seen.sum())
        costs = []
        for step in plan(n, rank=rank, world_size=world):
            source = zigzag.positions(length, rank=step.source, world_size=world)
            queries, keys = places[step.queries], source[step.keys]
            pairs = torch.ones(len(queries), len(keys), dtype=torch.int64)
            pairs = pairs.tril() if step.causal else pairs
            seen[queries[:, None], keys[None]] += pairs
            costs.append(int(pairs.sum()))
        work.append(int(seen.sum()) - before)
        # Also within a step nobody waits: half of the pairs each time, and the diagonal.
        assert costs[1:] == [n * n // 2] * (world - 1)
    assert torch.equal(seen, torch.ones_like(seen).tril())
    assert max(work) <= 1.05 * min(work)
    contiguous = [sum(range(r * n + 1, (r + 1) * n + 1)) for r in range(world)]
    assert world == 1 or max(contiguous) > 2 * min(contiguous)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_are_a_permutation_that_unshard_undoes(world) -> None:
    tensor = torch.randn(2, 12 * world, 3)
    shards = [zigzag.shard(tensor, rank=r, world_size=world) for r in range(world)]
    assert torch.equal(zigzag.unshard(shards), tensor)
    assert all(s.shape == (2, 12, 3) for s in shards)
    places = [zigzag.positions(12 * world, rank=r, world_size=world) for r in range(world)]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(12 * world))
    assert all(bool((p.diff() > 0).all()) for p in places)


def test_next_labels_hold_the_pairs_of_the_text_loss() -> None:
    labels = torch.tensor([[1, 2, 3, -100, 5, 6], [7, 8, 9, 10, 11, 12]])
    documents = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0]])
    expected = [[2, 3, -100, 5, 6, -100], [8, -100, 10, -100, -100, -100]]
    assert zigzag.next_labels(labels, documents).tolist() == expected


def test_lengths_that_cannot_be_shared_are_named() -> None:
    with pytest.raises(SequenceError, match="multiple of 8; pad 6 more"):
        zigzag.shard(torch.zeros(1, 10), rank=0, world_size=4)
    assert zigzag.padding(10, 4) == 6
    assert zigzag.padding(16, 4) == 0
    with pytest.raises(SequenceError, match="rank is 4"):
        zigzag.positions(16, rank=4, world_size=4)
    with pytest.raises(SequenceError, match="the same even number"):
        zigzag.unshard([torch.zeros(1, 4), torch.zeros(1, 6)])
    with pytest.raises(SequenceError, match="5 positions"):
        ring_attention(*(torch.zeros(1, 1, 5, 8) for _ in range(3)))
