"""xoron-moe to transformers' DeepSeek-V3 and back, weight by weight, with the same logits.

DeepSeek-V3 can say: latent attention, some leading dense layers and then experts in every layer,
sigmoid scores, a shared expert, no bias in the projections. What it cannot say is refused.

Footguns:
- Ours rotates halves. `rope_interleave` (their default) rotates neighbours: the rotated rows of
  queries and keys are permuted on the way.
- Their experts are stacked, gate over up; ours are one module each.
- `e_score_correction_bias` is our `selection_bias`, counted as weights here.
- Expert groups and multi-token prediction have no counterpart here.

Shapes: H heads, n = d_nope, p = d_rope, r latent rank, E experts, F inner width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from xoron_core.errors import ConfigError
from xoron_core.nn.rope import rotate_half_rows
from xoron_llm.moe.configuration import XoronMoeConfig
from xoron_llm.moe.modeling import XoronMoeForCausalLM

# Fields that both configs call the same.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_RENAMED = (
    (".mlp.router.weight", ".mlp.gate.weight"),
    (".mlp.router.selection_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
)


def to_deepseek_v3(
    model: XoronMoeForCausalLM, *, rope_interleave: bool = True
) -> DeepseekV3ForCausalLM:
    """The same model as transformers' class, with a copy of the weights.

    Args:
        model: with latent attention.
        rope_interleave: in which order the rotated rows are to stand; True is the published one.

    Raises:
        ConfigError: naming what DeepSeek-V3 cannot express.
    """
    config = model.config
    if problems := _not_expressible(config):
        raise ConfigError(f"DeepSeek-V3 cannot express this model: {'; '.join(problems)}")
    layers = config.num_hidden_layers
    theirs = DeepseekV3Config(
        **{name: getattr(config, name) for name in _SAME},
        n_routed_experts=config.num_experts,
        n_shared_experts=config.num_shared_experts,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=config.first_k_dense_replace if config.use_moe else layers,
        rope_parameters=dict(config.rope_parameters or {}),
        rope_interleave=rope_interleave,
        num_nextn_predict_layers=0,
    )
    state = _turn(model.state_dict(), config, order="back" if rope_interleave else None)
    renamed: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        (experts if ".mlp.experts." in name else renamed)[_rename(name)] = tensor
    for index in range(layers):
        stem = f"model.layers.{index}.mlp.experts."
        if config.is_moe_layer(index):
            gate, up, down = (
                torch.stack(
                    [experts[f"{stem}{e}.{part}.weight"] for e in range(config.num_experts)]
                )
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            renamed |= {f"{stem}gate_up_proj": torch.cat((gate, up), 1), f"{stem}down_proj": down}
    return _filled(DeepseekV3ForCausalLM(theirs), renamed, model)


def from_deepseek_v3(model: DeepseekV3ForCausalLM) -> XoronMoeForCausalLM:
    """The same model as ours, with a copy of the weights.

    Raises:
        ConfigError: for expert groups or projections with biases.
    """
    theirs = model.config
    groups = (theirs.n_group or 1) > (theirs.topk_group or 1)
    if groups or theirs.attention_bias or theirs.hidden_act != "silu":
        raise ConfigError(
            f"xoron-moe has no expert groups, no attention biases and silu alone, got n_group"
            f" {theirs.n_group} of which {theirs.topk_group} are chosen, attention_bias"
            f" {theirs.attention_bias}, hidden_act {theirs.hidden_act!r}"
        )
    dense = theirs.first_k_dense_replace or 0
    use_moe = dense < theirs.num_hidden_layers
    config = XoronMoeConfig(
        **{name: getattr(theirs, name) for name in _SAME},
        attention="latent",
        use_moe=use_moe,
        num_experts=theirs.n_routed_experts,
        num_shared_experts=theirs.n_shared_experts,
        moe_layer_freq=1,
        first_k_dense_replace=dense if use_moe else 0,
        rope_parameters=dict(theirs.rope_parameters),
    )
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, part = name.rpartition(".experts.")
        if part == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                state[f"{stem}.experts.{e}.gate_proj.weight"] = gate
                state[f"{stem}.experts.{e}.up_proj.weight"] = up
        elif part == "down_proj":
            for e, down in enumerate(tensor):
                state[f"{stem}.experts.{e}.down_proj.weight"] = down
        else:
            state[_rename(name, back=True)] = tensor
    turned = _turn(state, config, order="there" if theirs.rope_interleave else None)
    return _filled(XoronMoeForCausalLM(config), turned, model)


def _not_expressible(config: XoronMoeConfig) -> list[str]:
    checks = {
        f"attention is {config.attention!r}, expected 'latent'": config.attention != "latent",
        "mrope_section is set": config.mrope_section is not None,
    }
    if config.use_moe:
        checks |= {
            f"moe_layer_freq is {config.moe_layer_freq}, expected 1": config.moe_layer_freq != 1,
            "there is no shared expert": not config.use_shared_expert,
            f"scoring_func is {config.scoring_func!r}, expected 'sigmoid'": (
                config.scoring_func != "sigmoid"
            ),
        }
    return [text for text, wrong in checks.items() if wrong]


def _rename(name: str, *, back: bool = False) -> str:
    for ours, theirs in _RENAMED:
        name = name.replace(theirs, ours) if back else name.replace(ours, theirs)
    return name


def _turn(state: dict[str, Tensor], config: XoronMoeConfig, *, order: str | None) -> dict[str, Any]:
    """Puts the rotated rows in the order of halves (`there`) or of neighbours (`back`)."""
    if order is None:
        return dict(state)
    rows = rotate_half_rows(config.qk_rope_head_dim)
    rows = rows.argsort() if order == "back" else rows
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    turned = dict(state)
    for name, tensor in state.items():
        if name.endswith((".q_proj.weight", ".q_b_proj.weight")):
            heads = tensor.unflatten(0, (-1, width))
            turned[name] = _turn_last(heads, rows, config.qk_nope_head_dim).flatten(0, 1)
        elif name.endswith(".kv_a_proj_with_mqa.weight"):
            turned[name] = _turn_last(tensor.unsqueeze(0), rows, config.kv_lora_rank).squeeze(0)
    return turned


def _turn_last(tensor: Tensor, rows: Tensor, start: int) -> Tensor:
    """(H, start + p, D) with the last p rows reordered."""
    return torch.cat((tensor[:, :start], tensor[:, start:][:, rows.to(tensor.device)]), dim=1)


def _filled(target: Any, state: dict[str, Tensor], source: Any) -> Any:
    """Loads a complete state, in the source's precision, device and mode."""
    weight = source.get_input_embeddings().weight
    bias_dtype = torch.float32
    target.to(device=weight.device, dtype=weight.dtype).load_state_dict(
        {name: tensor.clone() for name, tensor in state.items()}
    )
    for name, buffer in target.named_buffers():
        if name.endswith(("selection_bias", "e_score_correction_bias")):
            buffer.data = state[name].to(bias_dtype).clone()
    target.tie_weights()
    return target.train(source.training)
