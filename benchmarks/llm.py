"""xoron-moe at the `xoron-dev` size beside transformers' DeepSeek-V3, Qwen3-MoE and dense Llama.

DeepSeek-V3 gets our attention sizes and dense layers first, as many layers with experts as ours;
Qwen3-MoE the shared expert as one more routed one; Llama the mean active feed-forward width. All
sides run in one process on one thread, interleaved; every ratio is a peer's time over ours in the
same round, so above 1 is faster. Floors are measured in the same rounds: FLOPs at the rate of a
GEMM, bytes at the rate of a memory read, and beside that at the rate of matrix-vector products.
Peak memory is that of one step beyond the weights, each side in a process of its own.

    hatch run bench llm
    hatch run bench llm --rows full
    hatch run bench llm --device cuda --dtype bfloat16

Footguns:
- Decoding starts from a cache that is filled with random numbers, so no prefill is in the time.
- With the full vocabulary only DeepSeek-V3 stands beside ours unless `--peers` names more: four
  models with gradients would take 24 GB.
- `--size tiny` and `--size half` are for slow or shared machines.

Shapes: B rows, N positions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.harness import (
    Report,
    arguments,
    compare,
    machine_floors,
    one_thread,
    peak_resident_megabytes,
    say,
    synchronised,
)
from xoron_core.nn.moe import MoE
from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM
from xoron_llm.moe.config import MoeConfig

OURS = "xoron-moe"
PEERS = ("DeepSeek-V3", "Qwen3-MoE", "Llama")
SIZES: dict[str, dict[str, Any]] = {
    "xoron-dev": {},
    "half": {"num_layers": 4, "num_heads": 16},
    "tiny": {
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 256,
        "kv_lora_rank": 64,
    },
}
ROWS = {"small": 8192, "full": 151_936}


def build(name: str, config: MoeConfig, rows: int) -> Any:
    """One of the four models, randomly initialised on the current default device."""
    layers, ffn, heads = config.num_layers, config.intermediate_size, config.num_heads
    sparse = layers // config.moe_layer_freq
    chosen = config.num_experts_per_tok + 1
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    common: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == OURS:
        return XoronMoeForCausalLM(XoronMoeConfig(**{**config.hf_data(), "vocab_size": rows}))
    if name == "DeepSeek-V3":
        deepseek = DeepseekV3Config(
            **common,
            intermediate_size=ffn,
            moe_intermediate_size=ffn,
            n_routed_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=layers - sparse,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=None,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=head,
        )
        return DeepseekV3ForCausalLM(deepseek)
    if name == "Qwen3-MoE":
        qwen = Qwen3MoeConfig(
            **common,
            head_dim=head,
            intermediate_size=ffn,
            moe_intermediate_size=ffn,
            decoder_sparse_step=config.moe_layer_freq,
            num_experts=config.num_experts + 1,
            num_experts_per_tok=chosen,
            norm_topk_prob=True,
        )
        return Qwen3MoeForCausalLM(qwen)
    mean = ((layers - sparse) * ffn + sparse * chosen * ffn) // layers
    return LlamaForCausalLM(LlamaConfig(**common, head_dim=head, intermediate_size=mean))


def active_parameters(model: nn.Module, config: MoeConfig) -> int:
    """Weights that one token is multiplied with: the embedding looks up, and experts are chosen."""
    total = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if isinstance(model, Qwen3MoeForCausalLM):
        experts, chosen = experts + 1, chosen + 1
    return total - routed + routed * chosen // experts


def prefill(model: Any, ids: Tensor) -> Callable[[], None]:
    """A side that reads the prompt into a cache and gives one row of logits."""

    @torch.no_grad()
    def side() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return side


def train_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """A side that runs forward and backward; gradients add up, so that no side allocates them."""

    def side() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return side


def decode(model: Any, context: int, new: int) -> Callable[[], None]:
    """A side that decodes `new` tokens one by one behind `context` cached ones."""
    cache, token = DynamicCache(config=model.config), torch.tensor([[7]], device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:  # what is cached does not change the time
        layer.keys, layer.values = (
            held.new_empty(*held.shape[:2], context, held.shape[-1]).normal_()
            for held in (layer.keys, layer.values)
        )

    @torch.no_grad()
    def side() -> None:
        for _ in range(new):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:  # back to the same context for the next round
            layer.keys = layer.keys[..., :context, :]
            layer.values = layer.values[..., :context, :]

    return side


def expert_sides(
    tokens: int, width: int, inner: int, like: Tensor
) -> dict[str, Callable[[], None]]:
    """One product of the same FLOPs and our block, 8 experts of which 2, forward and backward."""
    where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    moe = MoE(width, inner, num_experts=8, top_k=2, use_shared_expert=False).to(**where)
    x = torch.randn(1, tokens, width, requires_grad=True, **where)
    left = torch.randn(2 * tokens, width, requires_grad=True, **where)
    right = torch.randn(3 * inner, width, requires_grad=True, **where)
    out, wide = torch.randn_like(x), torch.randn(2 * tokens, 3 * inner, **where)
    return {
        OURS: lambda: moe(x).backward(out),
        "one GEMM": lambda: F.linear(left, right).backward(wide),
    }


def peak_memory(name: str, options: argparse.Namespace, config: MoeConfig, length: int) -> float:
    """Megabytes of one train step beyond the weights; call it in a fresh process."""
    torch.set_num_threads(1)
    model = _place(build(name, config, ROWS[options.rows]), options).train()
    ids = torch.randint(1, ROWS[options.rows], (1, length), device=options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        train_step(model, ids)()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    train_step(_place(build(name, MoeConfig.parse(SIZES["tiny"]), 64), options), ids[:, :8] % 64)()
    before = peak_resident_megabytes()
    train_step(model, ids)()
    return peak_resident_megabytes() - before


def memory_of(names: list[str], options: argparse.Namespace, config: MoeConfig, length: int) -> Any:
    """Peak megabytes by side, and the peers' over ours."""
    peaks = {}
    for name in names:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[name] = pool.submit(peak_memory, name, options, config, length).result()
    return {
        "megabytes": {name: round(peak) for name, peak in peaks.items()},
        "peers over ours": {
            name: round(peak / max(peaks[OURS], 1e-9), 3)
            for name, peak in peaks.items()
            if name != OURS
        },
    }


def speedups(report: Report) -> dict[str, float]:
    """A peer's time over ours."""
    return {name: round(side.ratio, 3) for name, side in report.sides.items() if name != OURS}


def of_floors(report: Report, *, flops: float = 0.0, read: float = 0.0) -> dict[str, float]:
    """The share of the machine's floor that ours reaches.

    Args:
        report: with the rates of `machine_floors`.
        flops: floating-point operations of the side.
        read: bytes it has to read.
    """
    gemm, memory, vectors = report.floors.values()
    seconds = report.sides[OURS].seconds
    shares = {"of floor": round((flops / gemm + read / memory) / 1e9 / seconds, 3)}
    if read:
        shares["of matrix-vector rate"] = round(read / 1e9 / vectors / seconds, 3)
    return shares


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements: name to our peers' time over ours and our share of the floor."""
    torch.manual_seed(0)
    smoke, rounds, rows = options.smoke, options.rounds, ROWS[options.rows]
    config = MoeConfig.parse({"attention": "latent", **SIZES[options.size]})
    length, contexts, new = (16, (16, 32), 2) if smoke else (512, (512, 8192), 4)
    floors = machine_floors(smoke=smoke, device=options.device, dtype=options.dtype)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    names = [OURS, *options.peers]
    models = {name: _place(build(name, config, rows), options).eval() for name in names}
    active = {name: active_parameters(model, config) for name, model in models.items()}
    ids = torch.randint(1, rows, (1, length), device=options.device)
    results: dict[str, Any] = {"active parameters": active}

    def measure(
        name: str, make: Callable[[], Mapping[str, Callable[[], None]]], **ideal: float
    ) -> None:
        if options.only not in name:
            return
        sides = {key: synchronised(side, options.device) for key, side in make().items()}
        report = compare(sides, rounds=rounds, clock=clock, floors=floors)
        low, high = zip(*(s.quartiles for n, s in report.sides.items() if n != OURS), strict=True)
        results[name] = {
            "seconds": round(report.sides[OURS].seconds, 4),
            "peers over ours": speedups(report),
            "quartiles from": round(min(low), 3),
            "to": round(max(high), 3),
            **of_floors(report, **ideal),
            "floors": {key: round(value, 1) for key, value in report.floors.items()},
        }
        say(f"{name}: {json.dumps(results[name])}")

    def each(side: Callable[..., Callable[[], None]], *args: Any) -> dict[str, Any]:
        return {name: side(model, *args) for name, model in models.items()}

    body = active[OURS] - rows * config.hidden_size  # a prefill needs one row of logits
    width, inner = config.hidden_size, config.intermediate_size
    measure(f"prefill {length}", partial(each, prefill, ids), flops=2.0 * body * length)
    weight = float(getattr(torch, options.dtype).itemsize)
    per_token = weight * config.num_layers * config.cache_width
    for context in contexts:
        read = new * (weight * active[OURS] + per_token * context)
        measure(f"decode at {context}", partial(each, decode, context, new), read=read)
    for model in models.values():
        model.train()
    flops = 6.0 * active[OURS] * length
    measure(f"train step 1x{length}", partial(each, train_step, ids), flops=flops)
    like = next(models[OURS].parameters()).new_empty(0)
    models.clear()
    for tokens in (16,) if smoke else (512, 2048):
        flops = 18.0 * 2 * tokens * width * inner
        sides = partial(expert_sides, tokens, width, inner, like)
        measure(f"experts at {tokens}", sides, flops=flops)
    if options.only in (memory := f"peak memory of a train step 1x{length}"):
        results[memory] = memory_of(names, options, config, length)
        say(f"{memory}: {json.dumps(results[memory])}")
    return results


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = arguments(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--size", choices=sorted(SIZES), default="xoron-dev", help="model size")
    parser.add_argument("--rows", choices=sorted(ROWS), default="small", help="vocabulary")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="the models beside ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="measurements whose name holds this")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = PEERS if options.rows == "small" or options.smoke else PEERS[:1]
    if options.smoke:
        options.size, options.rounds = "tiny", 1
    with one_thread():
        results = run(options)
    about = {name: getattr(options, name) for name in ("size", "rows", "device", "dtype")}
    if options.json:
        print(json.dumps({**about, **results}, indent=2))
        return 0
    print(f"{about}; a peer over ours: above 1 we are faster, or take less")
    for name, result in results.items():
        print(f"{name}: {json.dumps(result)}")
    ratios = [r["peers over ours"] for r in results.values() if "peers over ours" in r]
    if worst := [min(told.values()) for told in ratios if told]:
        print(f"median over measurements of the strongest peer: {statistics.median(worst):.2f}")
    return 0


def _place(model: nn.Module, options: argparse.Namespace) -> Any:
    return model.to(device=options.device, dtype=getattr(torch, options.dtype))


if __name__ == "__main__":
    sys.exit(main())
