"""The backbone `xoron-moe`, and what it shares with every wrapped causal language model.

Footguns:
- Rows (of embedding and head) are at least those of the token space, and are never taken away: a
  checkpoint's padding rows stay.
- With a cache, `attention_mask` and `document_ids` cover the cached positions too.

Shapes: B rows, N positions, S cached plus new positions, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xoron_core.components import AfterLayer, Backbone, BackboneOutput, Context, LossTerm
from xoron_core.config import Config
from xoron_core.errors import CompositionError
from xoron_core.nn.masks import valid_positions
from xoron_core.nn.moe import Groups, MoE, balance_metrics
from xoron_llm import hf
from xoron_llm.moe.config import MoeConfig
from xoron_llm.rows import resize_rows

_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "max_position_embeddings",
    "layer_types",
    "sliding_window",
    "vocab_size",
)
# Of the router's statistics: what counts each loss, and what is summed over a step.
_COUNTS = {"balance": "rows", "z": "tokens"}
_STATISTICS = ("load", "tokens", "entropy")


class CausalLMBackbone(Backbone):
    """Holds a transformers causal language model as `.model`; `forward` is left to its children."""

    def __init__(self, config: Config, context: Context, *, model: PreTrainedModel) -> None:
        super().__init__(config, context)
        self.model = model
        self.space = context.space
        self.text_config = model.config.get_text_config()
        self.hidden_size = int(self.text_config.hidden_size)

    @property
    def num_rows(self) -> int:
        """V: rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, N) ids to (B, N, D)."""
        return cast(Tensor, self.model.get_input_embeddings()(input_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        return cast(Tensor, self.model.get_output_embeddings()(hidden))

    def linear_head(self) -> nn.Module | None:
        """The output embedding, which is all that `logits` calls."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def resize_rows(self, rows: int, new_rows: Tensor, generator: torch.Generator) -> None:
        """Gives embedding and head at least that many rows; see `xoron_llm.rows`."""
        resize_rows(self.model, rows, new_rows=new_rows, generator=generator)

    def active_parameters(self) -> int:
        """Parameters that one position uses: of routed experts, only the chosen ones."""
        total = sum(parameter.numel() for parameter in self.parameters())
        routed = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next((n for k in names if (n := getattr(self.text_config, k, None))), 1)
        chosen = getattr(self.text_config, "num_experts_per_tok", None) or experts
        return total - routed + routed * chosen // experts

    def hf_fields(self) -> dict[str, Any]:
        """What transformers' generation and caches read from a config."""
        fields = {name: getattr(self.text_config, name, None) for name in _FIELDS}
        return {name: value for name, value in fields.items() if value is not None}


class XoronMoeBackbone(CausalLMBackbone):
    """The xoron-moe model with as many rows as the token space.

    Attributes:
        group_names: what `position_groups` number, for metrics apart; the composer sets more.
    """

    config: MoeConfig
    group_names: tuple[str, ...] = ("text",)

    def __init__(self, config: MoeConfig, context: Context) -> None:
        if context.space is None:
            raise CompositionError(
                f"slot {context.slot!r}: xoron-moe takes its vocabulary from the token space, and"
                " this composition has none; add tokenizer: {use: byte}"
            )
        hf_config = hf.XoronMoeConfig(vocab_size=context.space.size, **config.hf_data())
        super().__init__(config, context, model=hf.XoronMoeForCausalLM(hf_config))
        self.position_kind = "1d" if config.mrope_section is None else "mrope"
        self.fusion_layers = tuple(range(config.num_layers))

    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        after_layer: AfterLayer | None = None,
        position_groups: Tensor | None = None,
    ) -> BackboneOutput:
        """Runs the layers; statistics come while training, losses where their weight is not 0.

        `position_groups` (B, N) int64, indices into `group_names`, keep the statistics apart.
        """
        number = len(self.group_names)
        groups = None if position_groups is None else Groups(position_groups, number)
        output = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
            output_router_statistics=self.training or bool(self._coefficients),
            position_groups=groups,
            after_layer=after_layer,
        )
        seen = output.router_statistics or {}
        losses = {
            name: LossTerm(weight * seen[name].sum(), seen[_COUNTS[name]].sum())
            for name, weight in self._coefficients.items()
        }
        summed = {name: seen[name].detach() for name in _STATISTICS if seen and self.training}
        return BackboneOutput(output.last_hidden_state, output.past_key_values, losses, summed)

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rows that hold a token (`balance`) and tokens (`z`), once per layer with experts."""
        given = next((batch[k] for k in ("input_ids", "inputs_embeds") if k in batch), None)
        if given is None:
            return {}
        padding = batch.get("attention_mask"), batch.get("document_ids")
        valid = valid_positions(*padding, length=given.shape[1])
        if valid is None:
            valid = given.new_ones(given.shape[:2], dtype=torch.bool)
        layers = len(self.model.base_model.moe_blocks())
        counts = {"balance": valid.any(-1).sum() * layers, "z": valid.sum() * layers}
        return {name: counts[name].float() for name in self._coefficients}

    def after_optimizer_step(self, stats: Mapping[str, Tensor]) -> None:
        """Moves the selection biases of trained routers against the load of the step."""
        load = stats["load"]
        self.model.base_model.update_selection_biases(load.sum(1) if load.ndim == 3 else load)

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """`layer<index>/max_load`, `min_load`, `entropy` and `dropped` of each layer with experts.

        With groups, `layer<index>/<group>/...` too, for those that the step has tokens of.
        """
        layers = self.model.base_model.layers
        found = [index for index, layer in enumerate(layers) if isinstance(layer.mlp, MoE)]
        top_k = self.config.num_experts_per_tok
        return {
            f"layer{index}/{name}": value
            for index, *sums in zip(found, *(stats[key] for key in _STATISTICS), strict=True)
            for name, value in balance_metrics(*sums, top_k=top_k, names=self.group_names).items()
        }

    def cache_width(self) -> int:
        """Numbers of one cached position over all layers; r + d_rope each with latent attention."""
        return self.config.num_layers * self.config.cache_width

    @property
    def _coefficients(self) -> dict[str, float]:
        given = {
            "balance": self.config.balance_loss_coef,
            "z": self.config.router_z_loss_coef,
        }
        return {name: weight for name, weight in given.items() if weight and self.config.use_moe}
