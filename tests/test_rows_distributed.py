"""Proves that rows set apart train on two processes as in one, sharded (FSDP2) or replicated: the
same gradients, the same rows behind an optimizer step, and a state dict with the merged matrix.
"""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
IDS = [3, *range(250, 259)]  # rows of both halves of the matrix


def build(tied):
    """The same model on every process, its rows set apart."""
    import xoron_core
    from xoron_core.rows import separate

    backbone = {"use": "xoron-moe", "preset": "tiny", "num_layers": 2, "tie_word_embeddings": tied}
    model, _ = xoron_core.compose(
        {
            "tokenizer": {"use": "byte"},
            "backbone": backbone,
            "tokens": {"groups": ["control", "conversation"]},
        },
        seed=1,
    )
    model.requires_grad_(False)
    separate(model, torch.tensor(IDS))
    return model.train()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model, call, batches):
    """Gradients, and rows and matrices behind a step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1, foreach=False)
    for ids in batches:
        (call(input_ids=ids, labels=ids).loss / len(batches)).backward()
    grads = {name: whole(p.grad) for name, p in trained.items()}
    optimizer.step()
    rows = {name: whole(p).detach() for name, p in trained.items()}
    return grads, rows, {name: whole(tensor) for name, tensor in model.state_dict().items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank, folder, path, tied):
    sys.path[:0] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    plain, sharded, replicated = build(tied), shard(build(tied), mesh), build(tied)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    draws = torch.randint(259, (WORLD, 1, 24), generator=torch.Generator().manual_seed(0))
    draws[..., 4 : 4 + len(IDS)] = torch.tensor(IDS)
    grads, rows, state = step(plain, plain, draws)
    wrapped = torch.nn.parallel.DistributedDataParallel(replicated)
    for model, call in ((sharded, sharded), (replicated, wrapped)):
        its_grads, its_rows, its_state = step(model, call, draws[rank : rank + 1])
        assert its_grads.keys() == grads.keys()
        assert len(grads) == 2 - tied
        for name, grad in grads.items():
            assert grad.abs().sum() > 0
            torch.testing.assert_close(its_grads[name], grad, **CLOSE)
            torch.testing.assert_close(its_rows[name], rows[name], **CLOSE)
        assert its_state.keys() == state.keys() == before.keys()
        old = [row for row in range(len(rows_of(before))) if row not in IDS]
        for name, tensor in its_state.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert torch.equal(tensor[old], before[name][old]), name
                assert (tensor[IDS] != before[name][IDS]).any(-1).all(), name
            torch.testing.assert_close(tensor, state[name], **CLOSE)
    dist.destroy_process_group()


def rows_of(state):
    return next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_train_rows_as_one(tmp_path, tied):
    args = (str(tmp_path), list(sys.path), tied)
    mp.start_processes(work, args=args, nprocs=WORLD, start_method="spawn")
