"""Importing this module makes transformers' Auto classes open xoron-moe folders."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xoron_llm.moe.configuration import XoronMoeConfig
from xoron_llm.moe.modeling import XoronMoeForCausalLM, XoronMoeModel

AutoConfig.register(XoronMoeConfig.model_type, XoronMoeConfig, exist_ok=True)
AutoModel.register(XoronMoeConfig, XoronMoeModel, exist_ok=True)
AutoModelForCausalLM.register(XoronMoeConfig, XoronMoeForCausalLM, exist_ok=True)

__all__ = ["XoronMoeConfig", "XoronMoeForCausalLM", "XoronMoeModel"]
