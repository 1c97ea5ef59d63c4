"""Token space, special tokens, chat template and the tokenizer generated from them.

Light: the space and the special tokens only. `tokens.tokenizer`, `tokens.template` and
`tokens.encode` import transformers and are imported where they are used.
"""

from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_core.tokens.special_tokens import (
    REASONING_TOKENS,
    SPECIAL_TOKENS,
    UNCERTAINTY_TOKENS,
    catalogue,
    core_groups,
    get_reasoning_tokens,
    get_special_tokens_list,
    groups_of,
    pairs,
    select,
    strip_hidden_tokens,
)

__all__ = [
    "CodecRange",
    "TextBase",
    "TokenSpace",
    "REASONING_TOKENS",
    "SPECIAL_TOKENS",
    "UNCERTAINTY_TOKENS",
    "catalogue",
    "core_groups",
    "get_reasoning_tokens",
    "get_special_tokens_list",
    "groups_of",
    "pairs",
    "select",
    "strip_hidden_tokens",
]
