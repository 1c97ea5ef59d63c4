"""The backbone `hf`: any transformers causal language model behind xoron's `Backbone` interface.

Footguns:
- Rows (of embedding and head) are at least those of the token space, and are never taken away: a
  checkpoint's padding rows stay.
- Some architectures do more than a matrix product between hidden states and logits. Those known are
  reproduced; `load_source_weights` compares with the model's own logits, so an unknown one is an
  error and never a silently different model.

Shapes: B rows, N positions, S cached plus new positions, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from xoron_core.components import AfterLayer, BackboneOutput, Context
from xoron_core.errors import CompositionError, SequenceError
from xoron_core.hub import need_weights
from xoron_core.nn import masks
from xoron_llm.backbone import CausalLMBackbone
from xoron_llm.cache_size import numbers_per_position
from xoron_llm.hf_config import HfConfig
from xoron_llm.hf_model import build_model, transformers_config
from xoron_llm.rows import copy_weights, load_pretrained

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class HfBackbone(CausalLMBackbone):
    """Any transformers causal language model.

    Packed documents are kept apart by a mask that is handed to the model ready-made, so they
    need an attention implementation that takes one (`sdpa` or `eager`) and attention layers only.

    Raises:
        ConfigError: if the config is of no known type or not resolved.
        CompositionError: if transformers has no causal language model for it.
    """

    config: HfConfig

    def __init__(self, config: HfConfig, context: Context) -> None:
        hf_config = transformers_config(config)
        text_config = hf_config.get_text_config()
        rows = context.space.size if context.space is not None else 0
        text_config.vocab_size = max(getattr(text_config, "vocab_size", 0), rows)
        super().__init__(config, context, model=build_model(hf_config))
        types = set(getattr(self.text_config, "layer_types", None) or ())
        self.honours_documents = types <= _ATTENTION_LAYERS and self._implementation in (
            "sdpa",
            "eager",
        )

    @property
    def _implementation(self) -> str:
        return str(self.model.config._attn_implementation)

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
    ) -> BackboneOutput:
        """Runs the layers; see `Backbone.forward`.

        Raises:
            CompositionError: for `after_layer`, and for document ids it cannot honour.
            SequenceError: if a mask does not cover the cached positions.
        """
        if after_layer is not None:
            raise CompositionError(
                f"slot {self.slot!r}: a transformers model takes no fusion between its layers; use"
                " backbone: {use: xoron-moe}"
            )
        length = embeddings.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = masks.positions(
                length,
                past=past,
                attention_mask=attention_mask,
                document_ids=document_ids,
                device=embeddings.device,
            )
        mask: Any = attention_mask
        if document_ids is not None:
            mask = self._document_mask(embeddings, past, attention_mask, document_ids)
        output = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
        return BackboneOutput(output.last_hidden_state, output.get("past_key_values"))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V), scaled and capped as the architecture does it."""
        logits = super().logits(hidden)
        if (scale := getattr(self.text_config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scaling := getattr(self.text_config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (cap := getattr(self.text_config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def linear_head(self) -> nn.Module | None:
        """The output embedding, or None where the architecture scales or caps its logits."""
        more = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        if any(getattr(self.text_config, name, None) is not None for name in more):
            return None
        return super().linear_head()

    @classmethod
    def find_source(cls, config: HfConfig) -> None:
        """Asks the Hub for the weights of `path`, if it is a name.

        Raises:
            FolderError: if they cannot be fetched.
        """
        if config.path is not None:
            need_weights(config.path, "hf backbone")

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the weights of `path`, and draws the rows that are new to it.

        Loaded rows keep their values bit for bit. Without a path the weights stay random.

        Raises:
            FolderError: if there are no weights to load, or they are incomplete.
            CompositionError: if this adapter does not reproduce the model's own logits.
        """
        if self.config.path is not None:
            source = load_pretrained(self.config.path, _dtype(self.model))
            copy_weights(source, self.model, self.config.path)
            base_rows = int(source.get_input_embeddings().weight.shape[0])
            if self.space is not None:
                self.resize_rows(self.num_rows, self.space.new_rows(base_rows), generator)
        self._check_logits()

    def cache_width(self) -> int:
        """Numbers of one cached position over all layers, as the model really caches them.

        Where its layers do not run without values, keys and values by its config.
        """
        try:
            return numbers_per_position(self.model.config)
        except RuntimeError:
            return super().cache_width()

    def reset_buffers(self) -> None:
        """Recomputes rotary tables and the like, which a load leaves uninitialised."""
        for module in self.model.modules():
            if module._non_persistent_buffers_set and not list(module.parameters(recurse=False)):
                self.model._init_weights(module)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Compares a few positions with the model's own forward."""
        if self.model.device.type == "meta":
            return
        ids = torch.arange(4, device=self.model.device).remainder(self.num_rows).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        got = self.logits(self(self.embed(ids)).hidden).float()
        self.model.train(training)
        difference = (got - expected).abs().max().item()
        if difference > 0.01 * expected.abs().max().item():
            raise CompositionError(
                f"slot {self.slot!r}: {type(self.model).__name__} makes logits from hidden states"
                f" in a way the hf backbone does not know (off by {difference:.3g}); use another"
                " architecture"
            )

    def _document_mask(
        self, embeddings: Tensor, past: int, attention_mask: Tensor | None, document_ids: Tensor
    ) -> Any:
        """The mask, or one per layer type, in the form the attention implementation takes."""
        if not self.honours_documents:
            raise CompositionError(
                f"slot {self.slot!r}: {type(self.model).__name__} with {self._implementation!r}"
                " attention cannot keep packed documents apart; pad instead of packing, or load it"
                " with attn_implementation='sdpa'"
            )
        length = embeddings.shape[1]
        window = getattr(self.text_config, "sliding_window", None)
        types = set(getattr(self.text_config, "layer_types", None) or ())
        slides = window is not None and types != {"full_attention"}
        if slides and past:
            raise SequenceError(
                "document_ids after cached positions need layers that keep every position; this"
                f" model slides over {window}. Run packed rows without a cache"
            )
        full = masks.causal_mask(
            length,
            past=past,
            attention_mask=attention_mask,
            document_ids=document_ids,
            device=embeddings.device,
        )
        if full is None:
            return None
        if not slides:
            return self._as_implemented(full, embeddings)
        index = torch.arange(length, device=embeddings.device)
        near = full & (index[:, None] - index[None, :] < cast(int, window))
        if "full_attention" not in types:
            return self._as_implemented(near, embeddings)
        return {
            "full_attention": self._as_implemented(full, embeddings),
            "sliding_attention": self._as_implemented(near, embeddings),
        }

    def _as_implemented(self, mask: Tensor, like: Tensor) -> Tensor:
        if self._implementation == "sdpa":
            return mask
        lowest = torch.finfo(like.dtype).min
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, lowest)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
