"""Training and decoding of the `tiny` text model beside transformers' peers of equal active size.

The peers are built from the composed model's own numbers: Qwen3-MoE gets the shared expert as one
more routed one (the same matrices are multiplied per token), Llama the mean feed-forward width
that is active per layer. Sizes are printed, because "equal" is to within a router and a few
norms. All sides run in one process on one thread, interleaved; ratios are in time, so above 1 is
slower.

    hatch run bench text

Shapes: B rows, N positions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import xoron_core
from benchmarks.harness import Report, arguments, compare, machine_floors, one_thread

OURS = "xoron-moe"


def peers(backbone: Mapping[str, Any], rows: int) -> dict[str, nn.Module]:
    """Qwen3-MoE and Llama of the backbone's active size, randomly initialised.

    Args:
        backbone: the resolved config of `backbone/xoron-moe`.
        rows: rows of the embedding.
    """
    layers, ffn = backbone["num_layers"], backbone["intermediate_size"]
    expert = backbone["moe_intermediate_size"] or ffn
    shared = int(backbone["use_shared_expert"])
    active = expert * (backbone["num_experts_per_tok"] + shared)
    sparse = layers // backbone["moe_layer_freq"] if backbone["use_moe"] else 0
    common: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": backbone["hidden_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": backbone["num_heads"],
        "num_key_value_heads": backbone["num_kv_heads"] or backbone["num_heads"],
        "head_dim": backbone["head_dim"] or backbone["hidden_size"] // backbone["num_heads"],
        "max_position_embeddings": backbone["max_position_embeddings"],
        "tie_word_embeddings": backbone["tie_word_embeddings"],
    }
    qwen = Qwen3MoeConfig(
        **common,
        intermediate_size=ffn,
        decoder_sparse_step=backbone["moe_layer_freq"],
        moe_intermediate_size=expert,
        num_experts=backbone["num_experts"] + shared,
        num_experts_per_tok=backbone["num_experts_per_tok"] + shared,
        norm_topk_prob=True,
    )
    llama = LlamaConfig(
        **common, intermediate_size=round(((layers - sparse) * ffn + sparse * active) / layers)
    )
    return {
        "Qwen3-MoE": Qwen3MoeForCausalLM(qwen).eval(),
        "Llama": LlamaForCausalLM(llama).eval(),
    }


def trainer(model: nn.Module, ids: Tensor, loss: Callable[[Any], Tensor]) -> Callable[[], None]:
    """A side that takes one step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss(model(input_ids=ids, labels=ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoder(model: Any, prompt: Tensor, new: int) -> Callable[[], None]:
    """A side that decodes `new` tokens greedily with a cache, whatever they are."""
    mask = torch.ones_like(prompt)

    def decode() -> None:
        ids = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        # A side that stops early would look fast.
        assert ids.shape[1] == prompt.shape[1] + new

    return decode


def xoron_loss(output: Any) -> Tensor:
    """The mean loss per predicted token, which is what transformers' models return."""
    term = output.losses["text"]
    return term.sum / term.count


def rates(report: Report, tokens: int) -> dict[str, float]:
    """Tokens per CPU second, by side."""
    return {name: round(tokens / side.seconds, 1) for name, side in report.sides.items()}


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(__doc__.splitlines()[0], rounds=7).parse_args()
    rounds = 1 if options.smoke else options.rounds
    batch, length, context, new = (1, 32, 16, 4) if options.smoke else (4, 512, 256, 64)
    torch.manual_seed(0)
    ours, _ = xoron_core.compose(preset="tiny", plugins=["llm"], seed=0)
    backbone = ours.composition.slots["backbone"].config
    models: dict[str, nn.Module] = {OURS: ours, **peers(backbone, ours.config.vocab_size)}
    losses = {
        name: (xoron_loss if model is ours else lambda o: o.loss) for name, model in models.items()
    }
    ids = torch.randint(0, 256, (batch, length))
    floors = machine_floors(smoke=options.smoke)
    with one_thread():
        decode = compare(
            {name: decoder(model, ids[:1, :context], new) for name, model in models.items()},
            rounds=rounds,
            floors=floors,
        )
        for model in models.values():
            model.train()
        train = compare(
            {name: trainer(model, ids, losses[name]) for name, model in models.items()},
            rounds=rounds,
            floors=floors,
        )
    results = {
        f"train step {batch}x{length}": (train, batch * length),
        f"decode {new} after {context}": (decode, new),
    }
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    if options.json:
        told = {
            name: {**asdict(report), "tokens_per_second": rates(report, tokens)}
            for name, (report, tokens) in results.items()
        }
        print(json.dumps({"parameters": sizes, **told}, indent=2))
        return 0
    print("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    for name, (report, tokens) in results.items():
        print(f"\n{name}\n{report.table()}")
        told_rates = ", ".join(f"{side} {rate}" for side, rate in rates(report, tokens).items())
        print(f"tokens per CPU second: {told_rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
