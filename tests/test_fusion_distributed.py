"""Proves that processes with and without media train a fusion together, sharded (FSDP2) or not.

One process has a signal, the other only words; neither waits for the other, and the gradient is
that of both batches in one process.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TOY = Path(__file__).parent / "toy"
WORLD = 2
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def build():
    """The same model on every process, with no weight at zero."""
    import xoron_core

    parts = {"encoder": {"use": "signal-encoder"}, "projector": {"use": "signal-projector"}}
    model, processor = xoron_core.compose(
        {
            "signal": parts,
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "fusion": {"use": "cross-attention", "num_heads": 4},
            "tokens": {"groups": ["control", "conversation"]},
        }
    )
    with torch.no_grad():
        for block in model.fusion.adapters:
            block.o_proj.weight.fill_(0.01)
    return model.train(), processor


def batches(processor):
    """One for each process: with a signal, and of text alone."""
    heard = [{"type": "signal", "signal": torch.arange(16.0).sin().numpy()}]
    return [
        processor(
            [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}],
            train=True,
        )
        for content in (heard, "only words")
    ]


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def work(rank, folder, path):
    sys.path[:0] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    plain, processor = build()
    parts = batches(processor)
    (sum(plain(**batch).loss for batch in parts) / WORLD).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    sharded, replicated = shard(build()[0], mesh), build()[0]
    wrapped = torch.nn.parallel.DistributedDataParallel(replicated)
    for model, call in ((sharded, sharded), (replicated, wrapped)):
        call(**parts[rank]).loss.backward()
        for name, parameter in model.named_parameters():
            got = parameter.grad
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            torch.testing.assert_close(got, expected[name], **CLOSE)
            assert "fusion" not in name or expected[name].any(), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_media_trains_with_one_that_has_some(tmp_path):
    path = [str(TOY), *sys.path]
    mp.start_processes(work, args=(str(tmp_path), path), nprocs=WORLD, start_method="spawn")
