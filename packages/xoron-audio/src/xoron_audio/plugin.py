"""What xoron-audio contributes, as data; nothing heavy is imported to answer."""

from __future__ import annotations

from xoron_core.descriptors import Component, Modality, Preset, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1
GROUP = "xoron-core/multimodal"
_CODECS = (
    (
        "rvq-audio",
        "rvq_audio:RvqAudio",
        "config:RvqAudio",
        "Causal convolutions around a residual quantiser; codebooks that follow what they are"
        " given.",
    ),
    (
        "hf-audio",
        "hf_audio:HfAudio",
        "hf_config:HfAudio",
        "EnCodec, DAC and Mimi of transformers as they are, frozen.",
    ),
)


@hookimpl
def xoron_components() -> list[Component]:
    return [
        Component(
            kind="codec",
            name=name,
            modality="audio",
            factory=f"xoron_audio.codec.{factory}",
            config=f"xoron_audio.codec.{config}Config",
            summary=summary,
            token_groups=(GROUP,),
        )
        for name, factory, config, summary in _CODECS
    ]


@hookimpl
def xoron_modalities() -> list[Modality]:
    return [
        Modality(
            name="audio",
            content_types=("audio", "audio_url", "input_audio"),
            begin="<|audio|>",
            end="<|/audio|>",
            gen_begin="<|gen_audio|>",
            gen_end="<|/gen_audio|>",
            placeholder="<|audio_pad|>",
            load="xoron_audio.audio:load_audio",
            sample="xoron_audio.audio:sample_audio",
        )
    ]


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    """Voice, interruption, emotion, singing and sound effects of the published system."""
    from xoron_core.tokens.special_tokens import groups_of

    return groups_of("xoron-audio")


@hookimpl
def xoron_presets() -> list[Preset]:
    """The composition is not called `tiny`: a codec adds rows to every vocabulary it joins."""

    def of(name: str, file: str, component: str | None = None) -> Preset:
        return Preset(name, f"xoron_audio:presets/{file}.yaml", component=component)

    return [
        of("tiny-codec", "tiny-codec"),
        of("qwen3-uti", "qwen3-uti"),
        of("tiny", "rvq-audio-tiny", "codec/rvq-audio"),
        of("24khz", "rvq-audio-24khz", "codec/rvq-audio"),
        of("tiny", "hf-audio-tiny", "codec/hf-audio"),
    ]
