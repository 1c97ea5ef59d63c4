"""What xoron-llm contributes, as data; nothing heavy is imported to answer."""

from __future__ import annotations

from xoron_core.descriptors import Command, Component, Preset
from xoron_core.hookspecs import hookimpl

xoron_api = 1


@hookimpl
def xoron_components() -> list[Component]:
    return [
        Component(
            kind="backbone",
            name="xoron-moe",
            modality="text",
            factory="xoron_llm.backbone:XoronMoeBackbone",
            config="xoron_llm.moe.config:MoeConfig",
            summary="Decoder with latent or grouped-query attention and self-balancing experts.",
        ),
        Component(
            kind="backbone",
            name="hf",
            modality="text",
            factory="xoron_llm.hf_backbone:HfBackbone",
            config="xoron_llm.hf_config:HfConfig",
            summary="Any transformers causal language model, by folder, Hub name or config.",
        ),
        Component(
            kind="fusion",
            name="cross-attention",
            modality="text",
            factory="xoron_llm.fusion:CrossAttentionFusion",
            config="xoron_llm.fusion_config:CrossAttentionConfig",
            summary="Cross-attention on media between backbone layers; starts as the identity.",
        ),
        Component(
            kind="tokenizer",
            name="byte",
            modality="text",
            factory="xoron_llm.tokenizers.byte:ByteTokenizer",
            config="xoron_llm.tokenizers.config:ByteConfig",
            summary="The bytes of UTF-8: 256 ids, lossless, needs no file.",
        ),
        Component(
            kind="tokenizer",
            name="bpe",
            modality="text",
            factory="xoron_llm.tokenizers.trained:BpeTokenizer",
            config="xoron_llm.tokenizers.config:BpeConfig",
            summary="A byte-level BPE of one's own, as `xoron tokenizer` learns it from texts.",
        ),
        Component(
            kind="tokenizer",
            name="qwen2.5",
            modality="text",
            factory="xoron_llm.tokenizers.qwen:QwenTokenizer",
            config="xoron_llm.tokenizers.config:QwenConfig",
            summary="The Qwen2.5 vocabulary of 151,643 ranks, with or without its added tokens.",
            requires=("xoron-llm[qwen]",),
        ),
    ]


@hookimpl
def xoron_commands() -> list[Command]:
    return [Command("tokenizer", "xoron_llm.cli:tokenizer", "Learn a tokenizer from text files.")]


@hookimpl
def xoron_presets() -> list[Preset]:
    return [
        Preset("tiny", "xoron_llm:presets/tiny.yaml"),
        Preset("xoron-dev", "xoron_llm:presets/xoron-dev.yaml"),
        Preset("qwen3-vlm", "xoron_llm:presets/qwen3-vlm.yaml"),
        Preset("qwen3-uti", "xoron_llm:presets/qwen3-uti.yaml"),
        Preset("tiny", "xoron_llm:presets/xoron-moe-tiny.yaml", component="backbone/xoron-moe"),
        Preset("tiny", "xoron_llm:presets/hf-tiny.yaml", component="backbone/hf"),
        Preset(
            "xoron-dev",
            "xoron_llm:presets/xoron-moe-xoron-dev.yaml",
            component="backbone/xoron-moe",
        ),
        Preset(
            "tiny",
            "xoron_llm:presets/cross-attention-tiny.yaml",
            component="fusion/cross-attention",
        ),
    ]
