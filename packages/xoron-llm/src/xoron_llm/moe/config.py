"""What a composition says about the xoron-moe backbone. Imports no torch: plans read it."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from xoron_core.config import Config


class MoeConfig(Config):
    """Configuration of the `xoron-moe` backbone; the defaults are the published `xoron-dev`.

    The number of vocabulary rows is not here: it follows from the token space.

    Attributes:
        hidden_size: D, width of the residual stream.
        num_layers: number of decoder layers.
        num_heads: attention heads.
        num_kv_heads: key-value heads, dividing `num_heads`; None is `num_heads`.
        head_dim: width of one head, even; None is `hidden_size / num_heads`.
        intermediate_size: inner width of a dense feed-forward block.
        use_moe: whether there are mixture-of-experts layers at all.
        num_experts: routed experts of such a layer.
        num_experts_per_tok: how many of them a token uses.
        moe_intermediate_size: inner width of one expert; None is `intermediate_size`.
        moe_layer_freq: every n-th layer is one: of layers 1, 2, ... those divisible by it.
        use_shared_expert: whether one more expert serves every token.
        max_position_embeddings: positions the model is meant for.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of the norms.
        tie_word_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of the initial weights.
    """

    hidden_size: int = Field(default=1024, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=16, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    intermediate_size: int = Field(default=2048, ge=1)
    use_moe: bool = True
    num_experts: int = Field(default=8, ge=1)
    num_experts_per_tok: int = Field(default=2, ge=1)
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    moe_layer_freq: int = Field(default=2, ge=1)
    use_shared_expert: bool = True
    max_position_embeddings: int = Field(default=131072, ge=1)
    rope_theta: float = Field(default=500000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads};"
                " change one of them or give head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        if head_dim % 2:
            raise ValueError(
                f"head_dim is {head_dim} (hidden_size / num_heads unless given), expected an even"
                " number: rotary positions turn pairs"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads"
                f" {self.num_kv_heads}; every key-value head serves equally many heads"
            )
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts"
                f" {self.num_experts}; a token can use at most all of them"
            )
        if self.use_moe and self.moe_layer_freq > self.num_layers:
            raise ValueError(
                f"moe_layer_freq {self.moe_layer_freq} exceeds num_layers {self.num_layers}, so no"
                " layer would have experts; lower it or set use_moe: false"
            )
        return self

    def hf_data(self) -> dict[str, Any]:
        """The same as keywords of the transformers config, without the vocabulary size."""
        data = self.data()
        for ours, theirs in (
            ("num_layers", "num_hidden_layers"),
            ("num_heads", "num_attention_heads"),
            ("num_kv_heads", "num_key_value_heads"),
        ):
            data[theirs] = data.pop(ours)
        return data
