"""What a composition says about the xoron-moe backbone. Imports no torch: plans read it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from xoron_core.config import Config


class RopeScaling(Config):
    """How rotary positions reach beyond the trained length; see `xoron_core.nn.rope_scaling`.

    Attributes:
        rope_type: `yarn` (Peng et al., 2023) or `longrope` (Ding et al., 2024).
        factor: new length over trained length, at least 1.
        original_max_position_embeddings: trained length in positions.
        attention_factor: of the tables; None computes the published one.
        beta_fast, beta_slow: turns within the trained length between which yarn blends.
        truncate: whether yarn's blend ends at whole dimensions.
        mscale, mscale_all_dim: yarn only. Equal numbers move the attention factor from the tables
            into the scores of latent attention. `gqa` has it in the tables alone.
        short_factor, long_factor: longrope only, half as many numbers as rotated dimensions.
    """

    rope_type: Literal["yarn", "longrope"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(ge=1)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    truncate: bool | None = None
    mscale: float | None = Field(default=None, gt=0)
    mscale_all_dim: float | None = Field(default=None, gt=0)
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None

    @model_validator(mode="after")
    def _keys_fit_the_type(self) -> Self:
        yarn = {"beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"}
        longrope = {"short_factor", "long_factor"}
        given = {name for name, value in self.data().items() if value is not None}
        if wrong := given & (longrope if self.rope_type == "yarn" else yarn):
            raise ValueError(
                f"rope_scaling of type {self.rope_type!r} takes no {', '.join(sorted(wrong))}"
            )
        if self.rope_type == "longrope" and not given >= longrope:
            raise ValueError("rope_scaling of type 'longrope' needs short_factor and long_factor")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError(
                f"rope_scaling: beta_fast {self.beta_fast or 32} must exceed beta_slow"
                f" {self.beta_slow or 1}"
            )
        return self

    def parameters(self) -> dict[str, Any]:
        """The same as transformers' `rope_parameters`, without what is not set."""
        return {name: value for name, value in self.data().items() if value is not None}


class MoeConfig(Config):
    """Configuration of the `xoron-moe` backbone; the defaults are the published sizes.

    The number of vocabulary rows is not here: it follows from the token space.

    Attributes:
        hidden_size: D, width of the residual stream.
        num_layers: number of decoder layers.
        num_heads: attention heads.
        attention: `gqa` (grouped-query) or `latent` (multi-head latent attention).
        num_kv_heads: `gqa` only: key-value heads, dividing `num_heads`; None is `num_heads`.
        head_dim: `gqa` only: width of one head, even; None is `hidden_size / num_heads`.
        kv_lora_rank: `latent` only: r; the cache holds r + `qk_rope_head_dim` numbers per token.
        q_lora_rank: `latent` only: rank of a latent for queries; None has none.
        qk_nope_head_dim: `latent` only: width of a head's query and key without position.
        qk_rope_head_dim: `latent` only: width of the rotated part, even.
        v_head_dim: `latent` only: width of a head's value; None is that of query and key, for
            which nothing needs padding.
        intermediate_size: inner width of a dense feed-forward block.
        use_moe: whether there are mixture-of-experts layers at all.
        num_experts: routed experts of such a layer.
        num_experts_per_tok: how many of them a token uses.
        moe_intermediate_size: inner width of one expert; None is `intermediate_size`.
        moe_layer_freq: every n-th layer is one: of layers 1, 2, ... those divisible by it.
        first_k_dense_replace: so many leading layers are dense in any case.
        use_shared_expert: whether one more expert serves every token.
        num_shared_experts: how many experts' width that one has.
        scoring_func: router scores: `sigmoid` each, or `softmax` over the experts.
        norm_topk_prob: whether a token's expert weights sum to 1 before scaling.
        routed_scaling_factor: what they are multiplied with.
        bias_update_speed: by how much a step moves an expert's selection bias against its load;
            0 freezes it.
        balance_loss_coef: weight of the sequence-wise balance loss; 0 leaves it out.
        router_z_loss_coef: weight of the router's z-loss; 0 leaves it out.
        max_position_embeddings: positions the model is meant for.
        rope_theta: base of the rotary embedding.
        rope_scaling: beyond the trained length; None for none.
        mrope_section: frequencies of time, height and width, summing to half the rotated width;
            positions may then be (3, B, N). None has one position axis.
        rms_norm_eps: epsilon of the norms.
        tie_word_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of the initial weights.
    """

    hidden_size: int = Field(default=1024, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=16, ge=1)
    attention: Literal["gqa", "latent"] = "gqa"
    num_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    kv_lora_rank: int = Field(default=512, ge=1)
    q_lora_rank: int | None = Field(default=None, ge=1)
    qk_nope_head_dim: int = Field(default=32, ge=1)
    qk_rope_head_dim: int = Field(default=32, ge=2)
    v_head_dim: int | None = Field(default=None, ge=1)
    intermediate_size: int = Field(default=2048, ge=1)
    use_moe: bool = True
    num_experts: int = Field(default=8, ge=1)
    num_experts_per_tok: int = Field(default=2, ge=1)
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    moe_layer_freq: int = Field(default=2, ge=1)
    first_k_dense_replace: int = Field(default=0, ge=0)
    use_shared_expert: bool = True
    num_shared_experts: int = Field(default=1, ge=1)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    bias_update_speed: float = Field(default=0.001, ge=0)
    balance_loss_coef: float = Field(default=0.0, ge=0)
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    max_position_embeddings: int = Field(default=131072, ge=1)
    rope_theta: float = Field(default=500000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, int, int] | None = None
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        if self.attention == "latent":
            return self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def cache_width(self) -> int:
        """How many numbers one cached position takes in one layer."""
        if self.attention == "latent":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * (self.num_kv_heads or self.num_heads) * self.rope_dim

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.attention == "gqa" and self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads};"
                " change one of them or give head_dim"
            )
        if self.rope_dim % 2:
            name = "qk_rope_head_dim" if self.attention == "latent" else "head_dim"
            raise ValueError(
                f"{name} is {self.rope_dim} (for head_dim, hidden_size / num_heads unless given),"
                " expected an even number: rotary positions turn pairs"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads"
                f" {self.num_kv_heads}; every key-value head serves equally many heads"
            )
        if self.attention == "latent" and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, but latent attention has one latent for all"
                " heads; leave it out, and choose kv_lora_rank instead"
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        half, scaling = self.rope_dim // 2, self.rope_scaling
        if self.mrope_section is not None and (
            sum(self.mrope_section) != half or min(self.mrope_section) < 0
        ):
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} must sum to half the rotated width,"
                f" {half}"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name, None)
            if factors is not None and len(factors) != half:
                raise ValueError(
                    f"rope_scaling.{name} has {len(factors)} numbers, expected {half}, half the"
                    " rotated width"
                )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
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
        last = self.num_layers - self.num_layers % self.moe_layer_freq
        if self.use_moe and self.first_k_dense_replace >= last:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} leaves no layer with experts"
                f" (the last would be layer {last}); lower it or set use_moe: false"
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
        del data["rope_scaling"]
        if self.rope_scaling is not None:
            theta = data.pop("rope_theta")
            data["rope_parameters"] = {"rope_theta": theta, **self.rope_scaling.parameters()}
        return data
