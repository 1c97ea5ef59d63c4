"""A backbone that is a transformers Qwen3 model, with or without a folder its weights come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from xoron_core.components import Backbone, BackboneOutput
from xoron_core.config import Config


class QwenConfig(Config):
    """Where the weights come from, and whether the head is the embedding."""

    path: str | None = None
    tied: bool = False


def qwen(rows: int, *, tied: bool = False) -> Any:
    """A Qwen3 model of two small layers, its weights large enough to matter."""
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config)


class QwenBackbone(Backbone):
    """Documents are not kept apart: tests train on one per row."""

    honours_documents = False

    def __init__(self, config: QwenConfig, context: Any) -> None:
        super().__init__(config, context)
        self.model = qwen(context.space.size, tied=config.tied)
        self.hidden_size = 16

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

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
        output = self.model.base_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        )
        return BackboneOutput(output.last_hidden_state, None)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def resize_rows(self, rows: int, new_rows: Tensor, generator: torch.Generator) -> None:
        raise NotImplementedError

    def load_source_weights(self, generator: torch.Generator) -> None:
        if self.config.path is not None:
            source = AutoModelForCausalLM.from_pretrained(self.config.path)
            self.model.load_state_dict(source.state_dict())

    def reset_buffers(self) -> None:
        for module in self.model.modules():
            if module._non_persistent_buffers_set:
                self.model._init_weights(module)

    def hf_fields(self) -> dict[str, Any]:
        names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        fields = {name: getattr(self.model.config, name) for name in names}
        return fields | {"hidden_size": self.hidden_size}
