"""One causal attention layer over bytes, with dropout so that a run depends on random state, and
with experts where something is to be learned outside the gradient.

Shapes: B rows, N positions, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from xoron_core.components import Backbone, BackboneOutput, Tokenizer
from xoron_core.config import Config
from xoron_core.nn.moe import MoE, balance_metrics
from xoron_core.tokens.space import TextBase


class NoConfig(Config):
    """Nothing to choose."""


class StandInConfig(Config):
    """Width D, the rate of dropout and the number E of experts."""

    hidden_size: int = 16
    dropout: float = 0.0
    num_experts: int = 0


class StandInTokenizer(Tokenizer):
    """256 ids, each a byte."""

    def text_base(self) -> TextBase:
        return TextBase(
            name="standin/byte", size=256, identity="bytes", owned={}, normalization=None
        )

    def base(self) -> PreTrainedTokenizerFast:
        vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
        raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=raw)


class StandInModel(nn.Module):
    """The weights."""

    def __init__(self, rows: int, config: StandInConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.embedding = nn.Embedding(rows, size)
        self.places = nn.Embedding(2048, size)
        self.norm = nn.LayerNorm(size)
        self.attention = nn.Linear(size, 3 * size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.head = nn.Linear(size, rows, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        experts = config.num_experts
        self.moe = MoE(size, size, num_experts=experts, top_k=1) if experts else None
        if self.moe is not None:
            # Clear preferences: rounding must not turn a choice when runs are compared.
            nn.init.normal_(self.moe.router.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class StandInBackbone(Backbone):
    """Attention within each document, then an MLP."""

    def __init__(self, config: StandInConfig, context: Any) -> None:
        super().__init__(config, context)
        self.hidden_size = config.hidden_size
        self.gradient_checkpointing = False  # transformers sets it, and the function to use
        self.model = StandInModel(context.space.size, config)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embedding(input_ids)

    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> BackboneOutput:
        model = self.model
        length = embeddings.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=embeddings.device)
        x = embeddings + model.places(position_ids)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if document_ids is not None:
            mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])
        if self.gradient_checkpointing and self.training:
            return BackboneOutput(self._gradient_checkpointing_func(self._layer, x, mask), None)
        x = self._layer(x, mask)
        if model.moe is None:
            return BackboneOutput(x, None)
        valid = None if document_ids is None else document_ids != 0
        mixed, seen = model.moe(x, valid, observe=True)
        observed = {"load": seen.load, "tokens": seen.tokens, "entropy": seen.entropy}
        return BackboneOutput(x + mixed, None, {}, observed if self.training else {})

    def after_optimizer_step(self, stats: Mapping[str, Tensor]) -> None:
        self.model.moe.router.update_selection_bias(stats["load"], 0.01)

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        return balance_metrics(stats["load"], stats["tokens"], stats["entropy"], top_k=1)

    def _layer(self, x: Tensor, mask: Tensor) -> Tensor:
        model = self.model
        query, key, value = model.attention(model.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return model.dropout(x + model.mlp(x))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def resize_rows(self, rows: int, new_rows: Tensor, generator: torch.Generator) -> None:
        raise NotImplementedError

    def hf_fields(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": self.hidden_size,
        }
