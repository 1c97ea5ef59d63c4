"""xoron-moe: a pre-norm decoder with rotary attention, SwiGLU and experts that balance themselves.

- Attention is grouped-query or multi-head latent (`attention: latent`), which caches one small row
  per token and layer.
- Every `moe_layer_freq`-th layer routes each token to a few experts beside a shared one.
- Padding, left or right, and packed documents are kept apart by one mask for all layers; a
  batch without either takes the causal fast path. Padding is routed to no expert.
- `attn_implementation` names the attention kernel, see `xoron_core.nn.kernel_choice`; under
  `xoron_core.nn.context_parallel` the sequence is shared by processes.
- Rotary tables are computed at each forward: there is no buffer to go stale.

Footguns:
- With a cache, `attention_mask` and `document_ids` cover the cached positions too.
- `labels` are shifted inside and know nothing of documents: set the first label of each document to
  -100.
- A padded query attends to itself alone; its hidden state means nothing.
- Experts are balanced by `update_selection_biases`, which whoever trains has to call with the sum
  of the `router_statistics` of a step. `forward` itself changes nothing.

Shapes: B rows, N positions, D hidden size, V rows of the vocabulary, S cached plus new positions, M
layers with experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from xoron_core.components import AfterLayer
from xoron_core.errors import SequenceError
from xoron_core.nn import context_parallel, kernel_choice, masks
from xoron_core.nn.attention import Attention
from xoron_core.nn.kernels import Kernel, sdpa
from xoron_core.nn.latent_attention import LatentAttention
from xoron_core.nn.masks import valid_positions
from xoron_core.nn.memory import align_weights
from xoron_core.nn.mlp import SwiGLU
from xoron_core.nn.moe import Groups, MoE, RouterStatistics, TopKRouter
from xoron_core.nn.norms import RMSNorm
from xoron_llm.moe.cache import grow_in_place
from xoron_llm.moe.configuration import XoronMoeConfig
from xoron_llm.moe.experts import ExpertsChoice, experts_kernel

kernel_choice.register()


@dataclass
class MoeModelOutput(BaseModelOutputWithPast):
    """Attributes: router_statistics, as `RouterStatistics` with an axis M in front, or None."""

    router_statistics: dict[str, Tensor] | None = None


@dataclass
class MoeCausalLMOutput(CausalLMOutputWithPast):
    """Attributes: router_statistics, as `RouterStatistics` with an axis M in front, or None."""

    router_statistics: dict[str, Tensor] | None = None


class XoronMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each on a normalised copy added back to the stream."""

    def __init__(self, config: XoronMoeConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if config.is_moe_layer(index):
            self.mlp = MoE(
                config.hidden_size,
                cast(int, config.moe_intermediate_size),
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                use_shared_expert=config.use_shared_expert,
                num_shared_experts=config.num_shared_experts,
                scoring=cast(Any, config.scoring_func),
                normalize=config.norm_topk_prob,
                scaling_factor=config.routed_scaling_factor,
            )
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any = None,
        valid: Tensor | None = None,
        observe: bool = False,
        kernel: Kernel = sdpa,
        groups: Groups | None = None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, ...]:
        """(B, N, D) to (B, N, D), followed by the router's statistics if there are any."""
        # The cache goes by transformers' name: its checkpointing takes that keyword away. The
        # result is flat, because re-entrant checkpointing finds no tensors in nested ones.
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden), rope, mask=mask, cache=past_key_values, kernel=kernel
        )
        x = self.post_attention_layernorm(hidden)
        if not isinstance(self.mlp, MoE):
            return (hidden + self.mlp(x),)
        by = experts_kernel(self.config)
        if not observe:
            return (hidden + self.mlp(x, valid, kernel=by),)
        out, statistics = self.mlp(x, valid, kernel=by, observe=True, groups=groups)
        return (hidden + out, *statistics)


class XoronMoePreTrainedModel(ExpertsChoice, PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config: XoronMoeConfig
    config_class = XoronMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["XoronMoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"router"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": XoronMoeDecoderLayer}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the weights give bit for bit the outputs they gave when saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices, embedding and router from N(0, initializer_range); norms one, biases zero."""
        super()._init_weights(module)
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.selection_bias)


class XoronMoeModel(XoronMoePreTrainedModel):
    """The decoder without its head.

    Attributes:
        context_group: the processes that share each sequence, see `xoron_core.nn.context_parallel`;
            None where there is one process to a sequence.
    """

    context_group: dist.ProcessGroup | None = None

    def __init__(self, config: XoronMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            XoronMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_statistics: bool | None = None,
        position_groups: Groups | None = None,
        after_layer: AfterLayer | None = None,
        **kwargs: Any,
    ) -> MoeModelOutput:
        """Runs the layers.

        Args:
            input_ids: (B, N), or `inputs_embeds` instead.
            attention_mask: (B, S), nonzero where valid; or (B, 1, N, S), bool or additive, which
                is taken as it is. None is all valid.
            position_ids: (B, N), or (3, B, N) with `mrope_section`; None counts from each
                document's or row's first valid position.
            past_key_values: a transformers `Cache`, extended in place.
            inputs_embeds: (B, N, D).
            document_ids: (B, S), 1.. per packed document and 0 for padding.
            use_cache: whether to make a cache where none is given; None asks the config, and is
                False while activations are recomputed.
            output_router_statistics: whether to return what the routers observed; None does so
                while training.
            position_groups: of the N positions, for statistics apart.
            after_layer: called with (B, N, D) and the index of each layer that has just run; its
                result goes on to the next one. It runs outside activation recomputation.

        Raises:
            SequenceError: if not exactly one input is given, or a mask does not cover S.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise SequenceError(
                "expected exactly one of input_ids and inputs_embeds, got"
                f" {'neither' if input_ids is None else 'both'}"
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recomputing = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not recomputing:
            past_key_values = DynamicCache(config=self.config)
        grow_in_place(past_key_values)
        plain_mask = _two_dimensional(attention_mask)
        columns = {"past": _past(past_key_values), "document_ids": document_ids}
        kernel, mask = self._attend_by(hidden, attention_mask, past_key_values, **columns)
        if position_ids is None:
            position_ids = self._positions(hidden, attention_mask=plain_mask, **columns)
        rope = self.config.rotary.tables(position_ids)
        valid = valid_positions(plain_mask, document_ids, length=hidden.shape[1])
        observe = self.training if output_router_statistics is None else output_router_statistics
        shared = (rope, mask, valid, observe, kernel, position_groups)
        seen: list[tuple[Tensor, ...]] = []
        for index, layer in enumerate(self.layers):
            hidden, *statistics = layer(hidden, *shared, past_key_values=past_key_values)
            if statistics:
                seen.append(tuple(statistics))
            if after_layer is not None:
                hidden = after_layer(hidden, index)
        return MoeModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values if use_cache else None,
            router_statistics=_stacked(seen),
        )

    def _attend_by(
        self, hidden: Tensor, attention_mask: Tensor | None, cache: Any, **columns: Any
    ) -> kernel_choice.Choice:
        """The kernel of all layers and the mask that it takes."""
        columns["attention_mask"] = attention_mask
        if self.context_group is not None:
            return context_parallel.choose(self.context_group, **columns)
        length = hidden.shape[1]
        return kernel_choice.choose(
            self.config._attn_implementation,
            length=length,
            device=hidden.device,
            keys=None if cache is None else int(cache.get_mask_sizes(length, 0)[0]),
            config=self.config,
            **columns,
        )

    def _positions(self, hidden: Tensor, **columns: Any) -> Tensor:
        """(B or 1, N): where the positions stand in their documents, rows or shared sequence."""
        length, device = hidden.shape[1], hidden.device
        if self.context_group is not None:
            return context_parallel.positions(length, group=self.context_group, device=device)
        return masks.positions(length, device=device, **columns)

    def moe_blocks(self) -> list[MoE]:
        """The M blocks with experts, first layer first."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def update_selection_biases(self, load: Tensor) -> None:
        """Moves every router's selection bias against the load it saw; once per optimizer step.

        A router that is not trained keeps its bias: what is frozen stays bit for bit.

        Args:
            load: (M, E), summed over the step and all processes.
        """
        for block, seen in zip(self.moe_blocks(), load, strict=True):
            if block.router.weight.requires_grad:
                block.router.update_selection_bias(seen, self.config.bias_update_speed)


class XoronMoeForCausalLM(XoronMoePreTrainedModel, GenerationMixin):
    """The decoder and its head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: XoronMoeConfig) -> None:
        super().__init__(config)
        self.model = XoronMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_statistics: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutput:
        """As `XoronMoeModel.forward`, with logits.

        Args:
            labels: (B, N), -100 ignored; shifted inside. The loss is the mean in nats, or the sum
                over `num_items_in_batch` if that keyword is given. `shift_labels` instead are
                taken as they are, each beside the position that predicts it.
            logits_to_keep: logits of the last positions only, or of these indices; 0 for all.

        Returns:
            Logits (B, N or kept, V), the loss and the cache.
        """
        if labels is not None and self.model.context_group is not None:
            raise SequenceError(
                "labels of a shared sequence cannot be shifted inside its shards: each chunk's last"
                " label stands in another; pass what context_parallel.shard returns (shift_labels)"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            output_router_statistics=output_router_statistics,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return MoeCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_statistics=outputs.router_statistics,
        )


def _attention(config: XoronMoeConfig, index: int) -> Attention | LatentAttention:
    if config.attention == "latent":
        return LatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=cast(int, config.v_head_dim),
            layer_idx=index,
            logit_factor=config.rotary.logit_factor,
        )
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_idx=index,
    )


def _stacked(seen: list[tuple[Tensor, ...]]) -> dict[str, Tensor] | None:
    """The statistics of M layers to one tensor each, (M, ...)."""
    if not seen:
        return None
    # Layers may sit on different devices; statistics are small and meet on the first one's.
    device = seen[0][0].device
    return {
        name: torch.stack([values.to(device) for values in column])
        for name, column in zip(RouterStatistics._fields, zip(*seen, strict=True), strict=True)
    }


def _past(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _two_dimensional(attention_mask: Tensor | None) -> Tensor | None:
    return attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
