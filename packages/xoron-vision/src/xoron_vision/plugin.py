"""What xoron-vision contributes, as data; nothing heavy is imported to answer."""

from __future__ import annotations

from xoron_core.descriptors import Component, Modality, Preset, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1
GROUP = "xoron-core/multimodal"
PATCH_GROUP = "xoron-vision/image-patch"
_ENCODERS = (
    (
        "siglip",
        "xoron_vision.siglip:SiglipEncoder",
        "xoron_vision.config:SiglipConfig",
        "SigLIP and SigLIP 2 towers, fixed size or native aspect ratio; one feature per patch.",
    ),
    (
        "conv-vit",
        "xoron_vision.conv:ConvVitEncoder",
        "xoron_vision.config:ConvVitConfig",
        "Convolutions, then transformer layers: learns from few images.",
    ),
    (
        "xoron-vision",
        "xoron_vision.encoder:XoronVisionEncoder",
        "xoron_vision.config:XoronVisionConfig",
        "SigLIP tower, compression to 256 latents, dual-stream attention.",
    ),
)
_PROJECTORS = (
    ("perceiver", "perceiver:Perceiver", "Perceiver", "Latents attend to features: 64 positions."),
    (
        "perceiver-mlp",
        "perceiver:PerceiverMlp",
        "PerceiverMlp",
        "The Qwen3-VLM connector: latents attend to features, then two wide layers.",
    ),
    ("mlp", "simple:Mlp", "Mlp", "Two layers on every feature: as many positions as patches."),
    (
        "pixel-shuffle",
        "simple:PixelShuffle",
        "Group",
        "Squares of patches side by side in one position, then two layers.",
    ),
    ("spatial", "simple:Spatial", "Group", "The mean of each square of patches, then two layers."),
    (
        "c-abstractor",
        "c_abstractor:CAbstractor",
        "CAbstractor",
        "Convolutions and pooling to a square grid of positions.",
    ),
)
_AUTOENCODER = "xoron_vision.autoencoder"
_AUTOENCODERS = (
    Component(
        kind="autoencoder",
        name="kl-image",
        modality="image",
        factory=f"{_AUTOENCODER}.kl_image:KlImage",
        config=f"{_AUTOENCODER}.config:KlImageConfig",
        summary="Gaussian latents, 8 times smaller in height and width; reads diffusers' folders.",
    ),
    Component(
        kind="autoencoder",
        name="diffusers-image",
        modality="image",
        factory=f"{_AUTOENCODER}.diffusers_image:DiffusersImage",
        config=f"{_AUTOENCODER}.config:DiffusersImageConfig",
        summary="An image autoencoder of diffusers as it is, frozen.",
        requires=("xoron-vision[diffusers]",),
    ),
    Component(
        kind="loss",
        name="perceptual",
        modality="image",
        factory=f"{_AUTOENCODER}.perceptual:Perceptual",
        config=f"{_AUTOENCODER}.config:PerceptualConfig",
        summary="Distance of SigLIP features between images and their reconstructions.",
    ),
    Component(
        kind="loss",
        name="patch-gan",
        modality="image",
        factory=f"{_AUTOENCODER}.patch_gan:PatchGan",
        config=f"{_AUTOENCODER}.config:PatchGanConfig",
        summary="A discriminator of patches against reconstructions, hinge loss.",
    ),
)
_CODECS = (
    (
        "titok-fsq",
        "titok:TitokFsq",
        "config:Titok",
        "Transformers around a row of ids that lie on no grid; finite scalar quantisation.",
    ),
    (
        "vq-image",
        "vq_image:VqImage",
        "config:VqImage",
        "Convolutions around a grid of ids; a codebook that follows what it is given.",
    ),
    (
        "hf-vq",
        "hf_vq:HfVq",
        "hf_config:HfVq",
        "The image tokenizers of Emu3, Janus and Chameleon in transformers as they are, frozen.",
    ),
)


@hookimpl
def xoron_components() -> list[Component]:
    encoders = [
        Component("encoder", name, "image", factory, config, summary, token_groups=(GROUP,))
        for name, factory, config, summary in _ENCODERS
    ]
    projectors = [
        Component(
            kind="projector",
            name=name,
            modality="image",
            factory=f"xoron_vision.projectors.{factory}Projector",
            config=f"xoron_vision.projectors.config:{config}Config",
            summary=summary,
            token_groups=(GROUP, PATCH_GROUP) if name == "perceiver-mlp" else (GROUP,),
        )
        for name, factory, config, summary in _PROJECTORS
    ]
    codecs = [
        Component(
            kind="codec",
            name=name,
            modality="image",
            factory=f"xoron_vision.codec.{factory}",
            config=f"xoron_vision.codec.{config}Config",
            summary=summary,
            token_groups=(GROUP,),
        )
        for name, factory, config, summary in _CODECS
    ]
    return [*encoders, *projectors, *codecs, *_AUTOENCODERS]


@hookimpl
def xoron_modalities() -> list[Modality]:
    return [
        Modality(
            name="image",
            content_types=("image", "image_url", "input_image"),
            begin="<|image|>",
            end="<|/image|>",
            gen_begin="<|gen_image|>",
            gen_end="<|/gen_image|>",
            placeholder="<|image_pad|>",
            load="xoron_vision.image:load_image",
            sample="xoron_vision.image:sample_image",
        )
    ]


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    """The strings of Track A; a Qwen base owns the markers, so they are no new rows there."""
    tokens = {
        "image_patch": "<image_patch>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return [TokenGroup(PATCH_GROUP, tokens, hidden=frozenset(tokens))]


@hookimpl
def xoron_presets() -> list[Preset]:
    def of(name: str, file: str, component: str | None = None) -> Preset:
        return Preset(name, f"xoron_vision:presets/{file}.yaml", component=component)

    return [
        of("tiny", "tiny"),
        of("xoron-dev", "xoron-dev"),
        of("qwen3-vlm", "qwen3-vlm"),
        of("qwen3-uti", "qwen3-uti"),
        of("tiny", "siglip-tiny", "encoder/siglip"),
        of("so400m", "siglip-so400m", "encoder/siglip"),
        of("tiny", "conv-vit-tiny", "encoder/conv-vit"),
        of("tiny", "xoron-vision-tiny", "encoder/xoron-vision"),
        of("xoron-dev", "xoron-vision-xoron-dev", "encoder/xoron-vision"),
        of("tiny", "perceiver-tiny", "projector/perceiver"),
        of("tiny", "mlp-tiny", "projector/mlp"),
        of("tiny", "perceiver-mlp-tiny", "projector/perceiver-mlp"),
        of("tiny", "c-abstractor-tiny", "projector/c-abstractor"),
        of("tiny", "titok-fsq-tiny", "codec/titok-fsq"),
        of("xoron-dev", "titok-fsq-xoron-dev", "codec/titok-fsq"),
        of("tiny", "vq-image-tiny", "codec/vq-image"),
        of("f16", "vq-image-f16", "codec/vq-image"),
        of("tiny", "hf-vq-tiny", "codec/hf-vq"),
        of("tiny", "kl-image-tiny", "autoencoder/kl-image"),
        of("sd", "kl-image-sd", "autoencoder/kl-image"),
        of("flux", "kl-image-flux", "autoencoder/kl-image"),
        of("tiny", "diffusers-image-tiny", "autoencoder/diffusers-image"),
        of("tiny", "perceptual-tiny", "loss/perceptual"),
        of("tiny", "patch-gan-tiny", "loss/patch-gan"),
    ]
