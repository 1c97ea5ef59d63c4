"""xoron-core: composes any-to-any multimodal models from installed plug-ins.

Importing this package imports neither torch nor transformers; each name below is imported when it
is first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("xoron-core")

_LAZY = {
    "compose": "xoron_core.api",
    "load": "xoron_core.api",
    "save": "xoron_core.api",
    "load_slot": "xoron_core.folder",
    "save_delta": "xoron_core.deltas",
    "load_delta": "xoron_core.delta_loading",
    "save_rows": "xoron_core.row_deltas",
    "load_rows": "xoron_core.row_deltas",
    "registry": "xoron_core.plugins",
    "Session": "xoron_core.session",
    "Sampling": "xoron_core.sampling",
    "PrefixCache": "xoron_core.prefix",
    "Chat": "xoron_core.chat",
    "calibration": "xoron_core.confidence",
    "XoronConfig": "xoron_core.configuration",
    "XoronModel": "xoron_core.model",
    "XoronMultimodalModel": "xoron_core.model",
    "XoronProcessor": "xoron_core.processor",
    "TokenSpace": "xoron_core.tokens.space",
    "apply_chat_template_to_tokenizer": "xoron_core.tokens.template",
    "SPECIAL_TOKENS": "xoron_core.tokens.special_tokens",
    "REASONING_TOKENS": "xoron_core.tokens.special_tokens",
    "UNCERTAINTY_TOKENS": "xoron_core.tokens.special_tokens",
    "get_special_tokens_list": "xoron_core.tokens.special_tokens",
    "get_reasoning_tokens": "xoron_core.tokens.special_tokens",
    "strip_hidden_tokens": "xoron_core.tokens.special_tokens",
}

if TYPE_CHECKING:
    from xoron_core.api import compose, load, save
    from xoron_core.chat import Chat
    from xoron_core.confidence import calibration
    from xoron_core.configuration import XoronConfig
    from xoron_core.delta_loading import load_delta
    from xoron_core.deltas import save_delta
    from xoron_core.folder import load_slot
    from xoron_core.model import XoronModel, XoronMultimodalModel
    from xoron_core.plugins import registry
    from xoron_core.prefix import PrefixCache
    from xoron_core.processor import XoronProcessor
    from xoron_core.row_deltas import load_rows, save_rows
    from xoron_core.sampling import Sampling
    from xoron_core.session import Session
    from xoron_core.tokens.space import TokenSpace
    from xoron_core.tokens.special_tokens import (
        REASONING_TOKENS,
        SPECIAL_TOKENS,
        UNCERTAINTY_TOKENS,
        get_reasoning_tokens,
        get_special_tokens_list,
        strip_hidden_tokens,
    )
    from xoron_core.tokens.template import apply_chat_template_to_tokenizer

__all__ = [
    "compose",
    "load",
    "save",
    "load_slot",
    "save_delta",
    "load_delta",
    "save_rows",
    "load_rows",
    "registry",
    "Session",
    "Sampling",
    "PrefixCache",
    "Chat",
    "calibration",
    "XoronConfig",
    "XoronModel",
    "XoronMultimodalModel",
    "XoronProcessor",
    "TokenSpace",
    "apply_chat_template_to_tokenizer",
    "SPECIAL_TOKENS",
    "REASONING_TOKENS",
    "UNCERTAINTY_TOKENS",
    "get_special_tokens_list",
    "get_reasoning_tokens",
    "strip_hidden_tokens",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'xoron_core' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
