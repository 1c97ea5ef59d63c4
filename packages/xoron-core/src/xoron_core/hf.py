"""Registers the xoron classes with transformers' Auto classes.

    import xoron_core.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("out/")

Importing `xoron_core` alone does not import transformers, so this is a module of its own.
"""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM

from xoron_core.configuration import XoronConfig
from xoron_core.model import XoronModel

AutoModel.register(XoronConfig, XoronModel)
AutoModelForCausalLM.register(XoronConfig, XoronModel)

__all__ = ["XoronConfig", "XoronModel"]
