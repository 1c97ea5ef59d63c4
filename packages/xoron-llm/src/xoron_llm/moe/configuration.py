"""`XoronMoeConfig`: the transformers config of xoron-moe, under transformers' own names."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from xoron_core.config import Source
from xoron_core.errors import ConfigError
from xoron_core.nn.rope_scaling import KINDS, Rotary
from xoron_llm.moe.config import MoeConfig
from xoron_llm.moe.parallel import tensor_parallel_plan


class XoronMoeConfig(PretrainedConfig):
    """Configuration of `XoronMoeForCausalLM`; fields as in `MoeConfig`, vocabulary size added.

    `rope_theta=...` and `rope_scaling=...` are accepted and stand in `rope_parameters`, where
    transformers keeps them.

    Raises:
        ConfigError: for sizes that do not fit, or a rotary type this version does not have.
    """

    model_type = "xoron-moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "num_local_experts": "num_experts",
    }
    default_theta = 500_000.0

    vocab_size: int = 151643
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    attention: str = "gqa"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int | None = None
    use_moe: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    moe_layer_freq: int = 2
    first_k_dense_replace: int = 0
    use_shared_expert: bool = True
    num_shared_experts: int = 1
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    bias_update_speed: float = 0.001
    balance_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    max_position_embeddings: int = 131072
    rope_parameters: dict[str, Any] | None = None
    mrope_section: list[int] | tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        rope = dict(self.rope_parameters or {})
        kind = rope.get("rope_type", "default")
        if kind not in KINDS:
            raise ConfigError(
                f"xoron-moe: rope_type {kind!r} is not supported, expected one of"
                f" {', '.join(KINDS)}"
            )
        if self.head_dim is None and self.attention == "latent":
            self.head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        checked = {name: getattr(self, name, None) for name in MoeConfig.model_fields}
        checked["rope_theta"] = rope.pop("rope_theta", self.default_theta)
        rope.pop("type", None)
        if kind == "default" and (extra := set(rope) - {"rope_type"}):
            raise ConfigError(
                f"xoron-moe: rope_parameters of type 'default' take rope_theta alone, got"
                f" {', '.join(sorted(extra))}; name their rope_type, or leave them out"
            )
        checked["rope_scaling"] = rope if kind != "default" else None
        MoeConfig.parse(checked, Source("xoron-moe config"))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.v_head_dim is None:
            self.v_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How transformers splits the decoder over processes; see `xoron_llm.moe.parallel`."""
        return tensor_parallel_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """transformers 5.17 writes it back for tied embeddings, with what it has already."""

    @property
    def rotary_theta(self) -> float:
        """Base of the rotary embedding."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_theta))

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding that these parameters describe."""
        given = dict(self.rope_parameters or {})
        latent = self.attention == "latent"
        dim = self.qk_rope_head_dim if latent else self.head_dim
        kind = given.pop("rope_type", "default")
        sections = None if self.mrope_section is None else tuple(self.mrope_section)
        return Rotary(int(dim or 0), self.rotary_theta, kind, given, sections=sections)

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer of that 0-based index has experts."""
        in_turn = (index + 1) % self.moe_layer_freq == 0
        return self.use_moe and in_turn and index >= self.first_k_dense_replace
