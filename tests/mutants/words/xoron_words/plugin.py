"""What the plug-in contributes."""

from xoron_core.descriptors import Component, Preset
from xoron_core.hookspecs import hookimpl

xoron_api = 1
_CONFIGS = {
    "backbone": "xoron_llm.moe.config:MoeConfig",
    "tokenizer": "xoron_llm.tokenizers.config:ByteConfig",
    "fusion": "xoron_llm.fusion_config:CrossAttentionConfig",
}


@hookimpl
def xoron_components():
    return [
        Component(
            kind=kind,
            name="words",
            modality="text",
            factory=f"xoron_words.parts:Words{kind.capitalize()}",
            config=config,
            summary=f"A {kind} to put faults into.",
        )
        for kind, config in _CONFIGS.items()
    ]


@hookimpl
def xoron_presets():
    return [Preset("tiny", "xoron_words:tiny.yaml", component="backbone/words")]
