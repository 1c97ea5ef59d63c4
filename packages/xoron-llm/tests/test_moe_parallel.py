"""Proves that xoron-moe split over two processes by transformers' own tensor parallelism is the
local model: logits, greedy text over a cache, every parameter's gradient, and the saved folder.

With grouped-query and latent attention, experts and a shared expert; every process really holds a
part of the matrices; heads that cannot be divided are refused.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from xoron_core.errors import ConfigError
from xoron_llm.hf import XoronMoeForCausalLM

EVEN = {"vocab_size": 68}  # transformers 5.17 splits rows evenly
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"tie_word_embeddings": True},
    "latent": {
        "attention": "latent",
        "num_key_value_heads": None,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
    },
    "latent without a query latent": {
        "attention": "latent",
        "num_key_value_heads": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "use_shared_expert": False,
        "moe_layer_freq": 1,
    },
}


def test_two_processes_equal_one(tmp_path: Path, make: Any) -> None:
    for index, changes in enumerate(KINDS.values()):
        make(**EVEN, **changes).save_pretrained(tmp_path / str(index))
    make(**EVEN, num_key_value_heads=1).save_pretrained(tmp_path / "one head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.spawn(_process, args=(tmp_path,), nprocs=2)
    for index, changes in enumerate(KINDS.values()):
        saved = XoronMoeForCausalLM.from_pretrained(tmp_path / f"{index} again").state_dict()
        for name, tensor in make(**EVEN, **changes).state_dict().items():
            assert torch.equal(saved[name], tensor), name


def _process(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=limit)
    for index in range(len(KINDS)):
        _check(folder / str(index))
    with pytest.raises(ConfigError, match="num_key_value_heads is 1, expected a multiple of 2"):
        _split(folder / "one head")
    dist.destroy_process_group()


def _split(folder: Path) -> Any:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2)
    return XoronMoeForCausalLM.from_pretrained(folder, distributed_config=config)


def _check(folder: Path) -> None:
    local, split = XoronMoeForCausalLM.from_pretrained(folder), _split(folder)
    whole = {name for name, p in split.named_parameters() if not isinstance(p, DTensor)}
    shared = ("norm", "router", "kv_a_proj", "q_a_proj")
    assert all(any(word in name for word in shared) for name in whole), whole
    assert all(p.to_local().numel() < p.numel() for p in split.parameters() if _parted(p))
    x = torch.randint(1, 67, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    with torch.no_grad():
        expected, got = (m(x, attention_mask=mask).logits[mask.bool()] for m in (local, split))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(split.generate(x, **options), local.generate(x, **options))
    for model in (local, split):
        model.train()
        model(x, labels=x).loss.backward()
    gradients = {name: _full(p.grad) for name, p in split.named_parameters() if p.grad is not None}
    for name, parameter in local.named_parameters():
        assert parameter.grad.abs().max() > 0 or ".experts." in name, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    split.save_pretrained(f"{folder} again")


def _parted(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
