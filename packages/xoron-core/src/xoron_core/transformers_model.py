"""What transformers asks of a composite model, apart from `forward`: generation, embeddings, ties,
initialisation and folders.

Footgun: parts initialise themselves when they are built; transformers' global initialisation does
nothing here, or it would overwrite special initialisations.
"""

from __future__ import annotations

import re
from typing import Any, cast

from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel

from xoron_core import fill
from xoron_core.components import Backbone, Fusion, Loss, Part
from xoron_core.composer.composition import Composition
from xoron_core.configuration import XoronConfig
from xoron_core.errors import TokenSpaceError
from xoron_core.placeholders import with_images
from xoron_core.sampling import AllowedRows, text_rows
from xoron_core.tokens.space import TokenSpace


class TransformersModel(PreTrainedModel, GenerationMixin):
    """The base of `XoronModel`.

    Attributes:
        space: the token space, or None.
        composition: what the model is made of.
        frozen: names of the parameters that a slot's `freeze` or its component froze when it was
            built.
    """

    config_class = XoronConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    space: TokenSpace | None
    composition: Composition
    frozen: frozenset[str] = frozenset()

    @property
    def backbone(self) -> Backbone | None:
        """The backbone, or None."""
        raise NotImplementedError

    def need_backbone(self) -> Backbone:
        """The backbone, or an error that names what to install."""
        raise NotImplementedError

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers, again and again: 5.17 leaves marks that make it deaf the next time."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_attn_was_changed", None)

    # generation through transformers

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers, with media in the first step only, unless nothing is cached."""
        media = kwargs.pop("media", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        if media is not None and first:
            inputs["media"] = media
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """As transformers, with the media of each row repeated for its beams or samples."""
        if kwargs.get("media") is not None and expand_size > 1:
            kwargs["media"] = {
                slot: fill.repeat_rows(entry, expand_size)
                for slot, entry in kwargs["media"].items()
            }
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.space is not None:
            # First: a top-k over rows that are not allowed would leave nothing to choose from.
            processors.insert(0, AllowedRows(text_rows(self.space)))
        return processors

    def generate(self, *args: Any, images: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with rows masked that a text answer does not allow.

        Args:
            *args: for transformers: the input ids first.
            images: as `forward` takes them.
            **kwargs: for transformers.
        """
        self.need_backbone()
        if images is not None:
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            media, model = kwargs.get("media"), cast(Any, self)
            kwargs["media"] = with_images(model, media, images=images, input_ids=ids)
        return super().generate(*args, **kwargs)

    def generate_text(self, input_ids: Tensor, max_new_tokens: int = 100, **kwargs: Any) -> Tensor:
        """The published name of `generate`: (B, N) ids to (B, N + new) ids."""
        return cast(
            Tensor, self.generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **kwargs)
        )

    # what transformers asks of a composite model

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's input embedding."""
        return cast(nn.Module, self.need_backbone().model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's head."""
        return None if self.backbone is None else self.backbone.model.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's input embedding."""
        self.need_backbone().model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refused unless it changes nothing: row counts come from the token space.

        Raises:
            TokenSpaceError: if another size is asked for.
        """
        rows = self.space.size if self.space is not None else 0
        if new_num_tokens not in (None, rows):
            raise TokenSpaceError(
                f"this model's token space has {rows} rows; {new_num_tokens} were asked for."
                " Add token groups or codecs to its composition instead"
            )
        return self.get_input_embeddings()

    def init_weights(self) -> None:
        """Parts initialised themselves; only ties are made here."""
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Part):
            module.reset_buffers()

    def post_init(self) -> None:
        """Collects per instance what transformers keeps per class: ties, fp32, unsplit modules."""
        super().post_init()
        for name, module in self.named_modules():
            if isinstance(module, PreTrainedModel) and module is not self:
                ties = getattr(module, "all_tied_weights_keys", {})
                self.all_tied_weights_keys.update(
                    {f"{name}.{k}": f"{name}.{v}" for k, v in ties.items()}
                )
                self._no_split_modules |= set(module._no_split_modules or ())
                self._keep_in_fp32_modules |= set(module._keep_in_fp32_modules or ())
                self._keep_in_fp32_modules_strict |= set(module._keep_in_fp32_modules_strict or ())
            elif isinstance(module, Part) and not isinstance(module, Backbone):
                if not isinstance(module, Fusion):
                    # A fusion is entered by two methods, and sharding gathers for `forward` alone;
                    # as part of the whole model it is there for both.
                    self._no_split_modules.add(type(module).__name__)
                self._keep_in_fp32_modules_strict |= set(module.keep_fp32)
            if isinstance(module, Loss):  # of training only, so a folder has no weights of it
                self._keys_to_ignore_on_load_missing.add(rf"^{re.escape(name)}\.")
        self.tie_weights(recompute_mapping=False)
        self.frozen = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)

    # folders

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes the model folder (all but the tokenizer's files), whole or not at all."""
        from xoron_core.folder import save_model

        save_model(self, save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a model folder: transformers' loading, with the folder checked first.

        Raises:
            FolderError: if files are missing or truncated, or weights are missing or unexpected.
            TokenSpaceError: if the token space is not the one the weights were trained with.
        """
        from xoron_core.folder import open_model

        return open_model(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
