"""What xoron-timeseries contributes, as data; nothing heavy is imported to answer."""

from xoron_core.descriptors import Component, Kind, Modality, Preset, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1  # the plug-in API that this module was written for
_PARTS: dict[Kind, str] = {
    "encoder": "Patches of a series to features.",
    "projector": "Features to positions of the backbone, one each.",
    "codec": "An exponent, and for each value the nearest of learned levels.",
    "loss": "Squared error of reconstructed mantissas.",
}
_MARKERS = {
    "begin": "<|series|>",
    "end": "<|/series|>",
    "gen_begin": "<|gen_series|>",
    "gen_end": "<|/gen_series|>",
    "placeholder": "<|series_pad|>",
}


@hookimpl
def xoron_components() -> list[Component]:
    return [
        Component(
            kind=kind,
            name="timeseries",
            modality="series",
            factory=f"xoron_timeseries.parts:Series{kind.capitalize()}",
            config=f"xoron_timeseries.series:{kind.capitalize()}Config",
            summary=summary,
            token_groups=("xoron-timeseries/series",),
        )
        for kind, summary in _PARTS.items()
    ]


@hookimpl
def xoron_modalities() -> list[Modality]:
    load, sample = (f"xoron_timeseries.series:{name}" for name in ("load", "sample"))
    return [Modality("series", ("series",), **_MARKERS, load=load, sample=sample)]


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    return [TokenGroup("xoron-timeseries/series", _MARKERS)]


@hookimpl
def xoron_presets() -> list[Preset]:
    return [Preset("tiny", "xoron_timeseries:presets/tiny.yaml")]
