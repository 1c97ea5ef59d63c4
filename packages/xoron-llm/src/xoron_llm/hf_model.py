"""The transformers model that an `HfConfig` describes, with random weights."""

from __future__ import annotations

from typing import cast

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from xoron_core.errors import CompositionError, ConfigError
from xoron_llm.hf_config import HfConfig


def transformers_config(config: HfConfig) -> PretrainedConfig:
    """The typed config of the wrapped model.

    Raises:
        ConfigError: if it is not resolved, or transformers knows no such type.
    """
    if config.hf_config is None:
        raise ConfigError("hf backbone: the config is not resolved; build from config.resolved()")
    data = dict(config.hf_config)
    kind = data.pop("model_type")
    data.pop("transformers_version", None)
    if config.dtype is not None:
        data.pop("torch_dtype", None)
        data["dtype"] = config.dtype
    try:
        return AutoConfig.for_model(kind, **data)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"hf backbone: no usable config of type {kind!r}: {error}") from None


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of that config.

    Raises:
        CompositionError: if transformers has no causal language model for it.
    """
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    except (ValueError, ImportError) as error:
        raise CompositionError(
            f"hf backbone: transformers has no causal language model for a config of type"
            f" {config.model_type!r}: {error}"
        ) from None
