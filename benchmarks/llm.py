"""xoron-moe at the `xoron-dev` size beside transformers' DeepSeek-V3, Qwen3-MoE and dense Llama.

DeepSeek-V3 gets our attention sizes and dense layers first, as many layers with experts as ours;
Qwen3-MoE the shared expert as one more routed one; Llama the mean active feed-forward width. All
sides run in one process on one thread, interleaved; every ratio is a peer's time over ours in the
same round, so above 1 is faster. Floors are measured in the same rounds: FLOPs at the rate of a
GEMM, bytes at the rate of a memory read. `--size tiny` is for slow or shared machines.

    hatch run bench llm

Footguns:
- Peak memory and the full vocabulary are not measured here; decoding starts from a cache that is
  filled with random numbers, so that no prefill is in the time.

Shapes: B rows, N positions.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
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

from benchmarks.harness import Report, arguments, compare, machine_floors, one_thread, say
from xoron_core.nn.moe import MoE
from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM
from xoron_llm.moe.config import MoeConfig

OURS = "xoron-moe"
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
ROWS = 8192


def build(size: str) -> tuple[MoeConfig, dict[str, Any]]:
    """Our model and its peers, randomly initialised, with `ROWS` rows of vocabulary."""
    config = MoeConfig.parse({"attention": "latent", **SIZES[size]})
    layers, ffn, heads = config.num_layers, config.intermediate_size, config.num_heads
    sparse = layers // config.moe_layer_freq
    chosen = config.num_experts_per_tok + 1
    common: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
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
    mean = ((layers - sparse) * ffn + sparse * chosen * ffn) // layers
    llama = LlamaConfig(**common, head_dim=head, intermediate_size=mean)
    return config, {
        OURS: XoronMoeForCausalLM(XoronMoeConfig(**{**config.hf_data(), "vocab_size": ROWS})),
        "DeepSeek-V3": DeepseekV3ForCausalLM(deepseek),
        "Qwen3-MoE": Qwen3MoeForCausalLM(qwen),
        "Llama": LlamaForCausalLM(llama),
    }


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
    cache, token = DynamicCache(config=model.config), torch.tensor([[7]])
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:  # what is cached does not change the time
        layer.keys = torch.randn(*layer.keys.shape[:2], context, layer.keys.shape[-1])
        layer.values = torch.randn(*layer.values.shape[:2], context, layer.values.shape[-1])

    @torch.no_grad()
    def side() -> None:
        for _ in range(new):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:  # back to the same context for the next round
            layer.keys = layer.keys[..., :context, :]
            layer.values = layer.values[..., :context, :]

    return side


def expert_sides(tokens: int, width: int, inner: int) -> dict[str, Callable[[], None]]:
    """One product of the same FLOPs and our block, 8 experts of which 2, forward and backward."""
    moe = MoE(width, inner, num_experts=8, top_k=2, use_shared_expert=False)
    x = torch.randn(1, tokens, width, requires_grad=True)
    left = torch.randn(2 * tokens, width, requires_grad=True)
    right = torch.randn(3 * inner, width, requires_grad=True)
    out, wide = torch.randn_like(x), torch.randn(2 * tokens, 3 * inner)
    return {
        OURS: lambda: moe(x).backward(out),
        "one GEMM": lambda: F.linear(left, right).backward(wide),
    }


def speedups(report: Report) -> dict[str, float]:
    """A peer's time over ours."""
    return {name: round(side.ratio, 3) for name, side in report.sides.items() if name != OURS}


def of_floor(report: Report, *, flops: float = 0.0, read: float = 0.0) -> float:
    """The share of the machine's floor that ours reaches.

    Args:
        report: with the rates of `machine_floors`.
        flops: floating-point operations of the side.
        read: bytes it has to read.
    """
    rates = list(report.floors.values())
    ideal = flops / (rates[0] * 1e9) + read / (rates[1] * 1e9)
    return round(ideal / report.sides[OURS].seconds, 3)


def run(size: str, *, rounds: int, smoke: bool, only: str = "") -> dict[str, Any]:
    """All measurements: name to our peers' time over ours and our share of the floor."""
    torch.manual_seed(0)
    config, models = build(size)
    length, contexts, new = (16, (16, 32), 2) if smoke else (512, (512, 8192), 4)
    floors = machine_floors(smoke=smoke)
    active = active_parameters(models[OURS], config)
    ids = torch.randint(1, ROWS, (1, length))
    results: dict[str, Any] = {
        "active parameters": {n: active_parameters(m, config) for n, m in models.items()}
    }

    def measure(
        name: str, make: Callable[[], Mapping[str, Callable[[], None]]], **ideal: float
    ) -> None:
        if only not in name:
            return
        report = compare(make(), rounds=rounds, floors=floors)
        low, high = zip(*(s.quartiles for n, s in report.sides.items() if n != OURS), strict=True)
        results[name] = {
            "seconds": round(report.sides[OURS].seconds, 4),
            "peers over ours": speedups(report),
            "quartiles from": round(min(low), 3),
            "to": round(max(high), 3),
            "of floor": of_floor(report, **ideal),
        }
        say(f"{name}: {json.dumps(results[name])}")

    for model in models.values():
        model.eval()
    body = active - ROWS * config.hidden_size

    def each(side: Callable[..., Callable[[], None]], *args: Any) -> dict[str, Any]:
        return {name: side(model, *args) for name, model in models.items()}

    measure(f"prefill {length}", partial(each, prefill, ids), flops=2.0 * body * length)
    per_token = 4.0 * config.num_layers * config.cache_width
    for context in contexts:
        read = new * (4.0 * active + per_token * context)
        measure(f"decode at {context}", partial(each, decode, context, new), read=read)
    for model in models.values():
        model.train()
    measure(f"train step 1x{length}", partial(each, train_step, ids), flops=6.0 * active * length)
    models.clear()
    width, inner = config.hidden_size, config.intermediate_size
    for tokens in (16,) if smoke else (512, 2048):
        flops = 3.0 * 2 * (2 * tokens) * width * 3 * inner
        sides = partial(expert_sides, tokens, width, inner)
        measure(f"experts at {tokens}", sides, flops=flops)
    return results


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = arguments(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--size", choices=sorted(SIZES), default="xoron-dev", help="model size")
    parser.add_argument("--only", default="", help="measurements whose name holds this")
    options = parser.parse_args()
    size = "tiny" if options.smoke else options.size
    rounds = 1 if options.smoke else options.rounds
    with one_thread():
        results = run(size, rounds=rounds, smoke=options.smoke, only=options.only)
    if options.json:
        print(json.dumps({"size": size, **results}, indent=2))
        return 0
    print(f"size {size}, fp32, one thread, {ROWS} rows; a peer's time over ours, above 1 is faster")
    for name, result in results.items():
        print(f"{name}: {json.dumps(result)}")
    worst = statistics.median(
        min(r["peers over ours"].values()) for r in results.values() if "peers over ours" in r
    )
    print(f"median over measurements of the strongest peer's ratio: {worst:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
