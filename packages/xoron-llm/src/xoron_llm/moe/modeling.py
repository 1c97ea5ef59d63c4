"""xoron-moe: a pre-norm decoder with rotary grouped-query attention, SwiGLU and experts.

- Every `moe_layer_freq`-th layer routes each token to a few experts beside a shared one.
- Padding, left or right, and packed documents are kept apart by one mask for all layers; a
  batch without either takes the causal fast path.
- Rotary tables are computed at each forward: there is no buffer to go stale.

Footguns:
- With a cache, `attention_mask` and `document_ids` cover the cached positions too.
- `labels` are shifted inside and know nothing of documents: set the first label of each document to
  -100.
- A padded query attends to itself alone; its hidden state means nothing.

Shapes: B rows, N positions, D hidden size, V rows of the vocabulary, S cached plus new positions.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from xoron_core.errors import SequenceError
from xoron_core.nn import masks
from xoron_core.nn.attention import Attention
from xoron_core.nn.memory import align_weights
from xoron_core.nn.mlp import SwiGLU
from xoron_core.nn.moe import MoE, TopKRouter
from xoron_core.nn.norms import RMSNorm
from xoron_core.nn.rope import rotary_tables
from xoron_llm.moe.configuration import XoronMoeConfig


class XoronMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each on a normalised copy added back to the stream."""

    def __init__(self, config: XoronMoeConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            layer_idx=index,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if config.is_moe_layer(index):
            self.mlp = MoE(
                config.hidden_size,
                cast(int, config.moe_intermediate_size),
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                use_shared_expert=config.use_shared_expert,
            )
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        # The cache goes by transformers' name: its checkpointing takes that keyword away.
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden), rope, mask=mask, cache=past_key_values
        )
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class XoronMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config: XoronMoeConfig
    config_class = XoronMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["XoronMoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"router"}
    _supports_sdpa = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": XoronMoeDecoderLayer}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the weights give bit for bit the outputs they gave when saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices, embedding and router from N(0, initializer_range); norms one."""
        super()._init_weights(module)
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class XoronMoeModel(XoronMoePreTrainedModel):
    """The decoder without its head."""

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: (B, N), or `inputs_embeds` instead.
            attention_mask: (B, S), nonzero where valid; or (B, 1, N, S), bool or additive, which
                is taken as it is. None is all valid.
            position_ids: (B, N); None counts from each document's or row's first valid position.
            past_key_values: a transformers `Cache`, extended in place.
            inputs_embeds: (B, N, D).
            document_ids: (B, S), 1.. per packed document and 0 for padding.
            use_cache: whether to make a cache where none is given; None asks the config, and is
                False while activations are recomputed.

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
        mask = _mask(hidden, attention_mask, document_ids, past_key_values)
        if position_ids is None:
            position_ids = masks.positions(
                hidden.shape[1],
                past=_past(past_key_values),
                attention_mask=_two_dimensional(attention_mask),
                document_ids=document_ids,
                device=hidden.device,
            )
        rope = rotary_tables(
            position_ids, cast(int, self.config.head_dim), theta=self.config.rotary_theta
        )
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values if use_cache else None,
        )


class XoronMoeForCausalLM(XoronMoePreTrainedModel, GenerationMixin):
    """The decoder and its head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `XoronMoeModel.forward`, with logits.

        Args:
            labels: (B, N), -100 ignored; shifted inside. The loss is the mean in nats, or the sum
                over `num_items_in_batch` if that keyword is given.
            logits_to_keep: logits of the last positions only, or of these indices; 0 for all.

        Returns:
            Logits (B, N or kept, V), the loss and the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _past(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _two_dimensional(attention_mask: Tensor | None) -> Tensor | None:
    return attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None


def _mask(
    hidden: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, cache: Any
) -> Tensor | None:
    """The (B or 1, 1, N, S) mask of all layers, or None for the causal fast path."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    length = hidden.shape[1]
    return masks.causal_mask(
        length,
        past=_past(cache),
        keys=None if cache is None else int(cache.get_mask_sizes(length, 0)[0]),
        attention_mask=attention_mask,
        document_ids=document_ids,
        device=hidden.device,
    )
