"""A plug-in with the smallest backbone and tokenizer that train: xoron-train needs no sibling."""

from __future__ import annotations

from xoron_core.descriptors import Component
from xoron_core.hookspecs import hookimpl

xoron_api = 1


@hookimpl
def xoron_components() -> list[Component]:
    return [
        Component(
            "backbone",
            "standin-lm",
            "text",
            "standin_parts:StandInBackbone",
            "standin_parts:StandInConfig",
            "One layer of attention.",
        ),
        Component(
            "tokenizer",
            "standin-byte",
            "text",
            "standin_parts:StandInTokenizer",
            "standin_parts:NoConfig",
            "Bytes.",
        ),
    ]
