"""Proves that a sequence shared by 2 and 4 processes gives what one process gives, on every rank.

Logits, loss, every parameter's gradient and the experts' load, with grouped-query and latent
attention, experts, padding, and activations kept or recomputed; decoding on from the gathered cache
of a prefill; training steps under FSDP2 over the same processes and over pairs of them; and that
what a ring cannot do is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xoron_core import losses
from xoron_core.errors import CompositionError, SequenceError
from xoron_core.nn.context_parallel import (
    deparallelize,
    gather_cache,
    group_of,
    parallelize,
    shard,
    sum_gradients,
    text_count,
    text_loss,
    unshard,
)
from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_experts": 4,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,
}
LATENT = {
    "attention": "latent",
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
FORMS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "latent": LATENT,
    "narrow-value": {**LATENT, "v_head_dim": 12, "q_lora_rank": 16},
}
LENGTH = 13  # no multiple of 2 W


def _models() -> Iterator[XoronMoeForCausalLM]:
    for changes in FORMS.values():
        torch.manual_seed(1)
        yield XoronMoeForCausalLM(XoronMoeConfig(**{**SIZES, **changes}))


def _batch(rows: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 67, (rows, LENGTH), generator=generator)
    mask = torch.ones_like(x)
    mask[1:, 9:] = 0
    labels = x.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": x, "attention_mask": mask, "labels": labels}


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return got


def _check_training(rank: int, world: int, group: Any = None) -> None:
    ways = ("ids",) if group else ("ids", "embeddings", "recomputed", "reentrant")
    batch = _batch()
    count = (batch["labels"][:, 1:] != -100).sum()
    valid = batch["attention_mask"].bool()
    for model in _models():
        whole = model(**batch, num_items_in_batch=count)
        whole.loss.backward()
        expected = _gradients(model)
        assert min(g.abs().max() for g in expected.values()) > 1e-4
        assert len(expected) == len(list(model.parameters()))
        for way in ways[: 4 if world == 2 else 3]:
            given = dict(batch)
            if way == "embeddings":
                given["inputs_embeds"] = model.model.embed_tokens(given.pop("input_ids"))
            if way in ("recomputed", "reentrant"):
                model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
                model.enable_input_require_grads()
            parallelize(model, group)
            assert group_of(model) is (group or dist.group.WORLD)
            out = model(**shard(given, group=group))
            out.loss.backward()
            sum_gradients(model, group=group)
            assert group_of(deparallelize(model)) is None
            loss, load = out.loss.detach(), out.router_statistics["load"].clone()
            for share in (loss, load):
                dist.all_reduce(share, group=group)
            torch.testing.assert_close(loss, whole.loss.detach(), **CLOSE)
            assert torch.equal(load, whole.router_statistics["load"])
            logits = unshard(out.logits, LENGTH, group=group)
            torch.testing.assert_close(logits[valid], whole.logits.detach()[valid], **CLOSE)
            got = _gradients(model)
            assert got.keys() == expected.keys()
            for name, gradient in got.items():
                torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=name)


def _check_text_loss(rank: int, world: int) -> None:
    """The loss of composed models: a weighted sum and a count."""
    model, batch = next(_models()), _batch()
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(2))
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    head = model.lm_head
    whole = losses.text_loss(
        hidden.last_hidden_state, batch["labels"], head, head=head, loss_weights=weights
    )
    part = shard({**batch, "loss_weights": weights})
    inputs = {name: part[name] for name in ("input_ids", "attention_mask", "position_ids")}
    term = text_loss(parallelize(model).model(**inputs).last_hidden_state, part, head, head=head)
    torch.testing.assert_close(text_count(part), term.count)
    got = torch.stack([term.sum.detach(), term.count, term.metrics["accuracy"][1]])
    dist.all_reduce(got)
    expected = torch.stack([whole.sum.detach(), whole.count, whole.metrics["accuracy"][1]])
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def _check_decoding(rank: int, world: int) -> None:
    x = _batch()["input_ids"]
    for model in _models():
        model.eval()
        ids = model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected = model(ids).logits
        parallelize(model)
        part = shard({"input_ids": x})
        del part["position_ids"]  # what the model takes by itself
        prefill = model(**part, use_cache=True)
        with pytest.raises(SequenceError, match="already holds"):
            model(x[:, :2], past_key_values=prefill.past_key_values)
        cache = gather_cache(prefill.past_key_values, LENGTH)
        deparallelize(model)
        assert type(cache) is DynamicCache
        assert cache.get_seq_length() == LENGTH
        if model.config.attention == "latent":
            assert cache.layers[1].keys.shape == (3, 1, LENGTH, 24 + 8)
            assert cache.layers[1].values.numel() == 0
        for column in range(LENGTH, ids.shape[1]):
            step = model(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, -1], expected[:, column], **CLOSE)


def _check_fsdp(rank: int, world: int) -> None:
    """Parameters after 3 steps; of 4 processes, two pairs share different rows."""
    data, ring = (1, world) if world == 2 else (2, world // 2)
    mesh = init_device_mesh("cpu", (data, ring), mesh_dim_names=("data", "context"))
    everyone = init_device_mesh("cpu", (world,))
    group, mine = mesh["context"].get_group(), mesh["data"].get_local_rank()
    for local, sharded in zip(_models(), _models(), strict=True):
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(sharded, mesh=everyone)
        parallelize(sharded, group)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (local, sharded)]
        before = [p.detach().clone() for p in local.parameters()]
        for step in range(3):
            batch = _batch(rows=2 * data, seed=step)
            count = (batch["labels"][:, 1:] != -100).sum()
            local(**batch, num_items_in_batch=count).loss.backward()
            rows = {name: tensor.chunk(data)[mine] for name, tensor in batch.items()}
            part = shard(rows, group=group) | {"num_items_in_batch": count}
            (sharded(**part).loss * world).backward()  # FSDP2 averages
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        names = [name for name, _ in local.named_parameters()]
        pairs = zip(names, before, local.parameters(), sharded.parameters(), strict=True)
        for name, old, right, got in pairs:
            assert (right - old).abs().max() > 1e-4
            torch.testing.assert_close(got.full_tensor(), right, **CLOSE, msg=name)


def _check_pairs(rank: int, world: int) -> None:
    """Two rings of two in four processes, the second one's ranks being 2 and 3."""
    groups = [dist.new_group(list(range(start, start + 2))) for start in range(0, world, 2)]
    _check_training(rank, world, groups[rank // 2])


def _check_refusals(rank: int, world: int) -> None:
    batch = _batch()
    packed = torch.ones_like(batch["input_ids"])
    packed[0, 7:] = 2
    with pytest.raises(SequenceError, match="keeps no documents apart"):
        shard({**batch, "document_ids": packed})
    with pytest.raises(SequenceError, match="padding at the end of rows only"):
        shard({**batch, "attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(SequenceError, match="cannot share media between"):
        shard({**batch, "media": packed})
    with pytest.raises(SequenceError, match=r"input_ids: 13 .* labels: 12 positions"):
        shard({**batch, "labels": packed[:, 1:]})
    with pytest.raises(SequenceError, match="got labels: 13"):
        shard({"labels": packed})
    model = parallelize(next(_models()))
    part = shard(batch)
    with pytest.raises(SequenceError, match="keeps no documents apart"):
        model(part["input_ids"], document_ids=torch.ones_like(part["input_ids"]))
    with pytest.raises(SequenceError, match="cannot be shifted inside"):
        model(part["input_ids"], labels=part["input_ids"])
    inside = torch.ones_like(part["input_ids"])
    inside[:, 0] = 0
    with pytest.raises(SequenceError, match="padding at the end of rows only"):
        model(part["input_ids"], attention_mask=inside)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    with pytest.raises(CompositionError, match="LlamaForCausalLM has no part"):
        parallelize(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)))


def _worker(rank: int, world: int, folder: str) -> None:
    """Runs all checks in one process of the group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    checks = [_check_training, _check_text_loss, _check_decoding, _check_fsdp]
    checks.append(_check_refusals if world == 2 else _check_pairs)
    try:
        for check in checks:
            check(rank, world)
    finally:
        dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_share_a_sequence_equal_one(world: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    multiprocessing.spawn(_worker, args=(world, str(tmp_path)), nprocs=world, join=True)
    assert len(list(tmp_path.glob("done-*"))) == world
