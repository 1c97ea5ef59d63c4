"""A plug-in with the smallest parts that train, also on media: xoron-train needs no sibling."""

from __future__ import annotations

from xoron_core.descriptors import Component, Modality, TokenGroup
from xoron_core.hookspecs import hookimpl
from xoron_train.hookspecs import Dataset, EvaluationType

xoron_api = 1

_MARKERS = {
    "begin": "<|grid|>",
    "end": "<|/grid|>",
    "gen_begin": "<|gen_grid|>",
    "gen_end": "<|/gen_grid|>",
    "placeholder": "<|grid_pad|>",
}


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
            "backbone",
            "standin-qwen",
            "text",
            "standin_qwen:QwenBackbone",
            "standin_qwen:QwenConfig",
            "A transformers model.",
        ),
        Component(
            "tokenizer",
            "standin-byte",
            "text",
            "standin_parts:StandInTokenizer",
            "standin_parts:NoConfig",
            "Bytes.",
        ),
        Component(
            "encoder",
            "standin-grid",
            "grid",
            "standin_media:GridEncoder",
            "standin_media:GridConfig",
            "One layer.",
            token_groups=("xoron-standin/grid",),
        ),
        Component(
            "projector",
            "standin-grid",
            "grid",
            "standin_media:GridProjector",
            "standin_media:GridProjectorConfig",
            "As many layers as positions.",
            token_groups=("xoron-standin/grid",),
        ),
        Component(
            "codec",
            "standin-grid",
            "grid",
            "standin_media:GridCodec",
            "standin_media:GridCodecConfig",
            "Two rounded numbers a row.",
            token_groups=("xoron-standin/grid",),
        ),
    ]


@hookimpl
def xoron_modalities() -> list[Modality]:
    return [Modality("grid", ("grid",), **_MARKERS, load="standin_media:load_grid")]


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    return [TokenGroup("xoron-standin/grid", _MARKERS)]


@hookimpl
def xoron_datasets() -> list[Dataset]:
    splits = ("train", "held-out", "unseen")
    return [Dataset("standin-grids", "standin_media:grids", splits, "The first number of a grid.")]


@hookimpl
def xoron_evaluations() -> list[EvaluationType]:
    return [
        EvaluationType(
            "standin-noisy", "standin_media:Noisy", "standin_media:NoisyConfig", "Says anything."
        )
    ]
