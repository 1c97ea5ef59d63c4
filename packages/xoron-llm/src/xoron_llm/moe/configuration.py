"""`XoronMoeConfig`: the transformers config of xoron-moe, under transformers' own names."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from xoron_core.config import Source
from xoron_core.errors import ConfigError
from xoron_llm.moe.config import MoeConfig


class XoronMoeConfig(PretrainedConfig):
    """Configuration of `XoronMoeForCausalLM`; fields as in `MoeConfig`, vocabulary size added.

    `rope_theta=...` is accepted and stands in `rope_parameters`, where transformers keeps it.

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
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    use_moe: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    moe_layer_freq: int = 2
    use_shared_expert: bool = True
    max_position_embeddings: int = 131072
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        checked = {name: getattr(self, name, None) for name in MoeConfig.model_fields}
        MoeConfig.parse({**checked, "rope_theta": self.rotary_theta}, Source("xoron-moe config"))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            raise ConfigError(f"xoron-moe: rope_type {kind!r} is not supported, expected 'default'")

    @property
    def rotary_theta(self) -> float:
        """Base of the rotary embedding."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_theta))

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer of that 0-based index has experts."""
        return self.use_moe and (index + 1) % self.moe_layer_freq == 0
