"""What the toy plug-in contributes."""

from xoron_core.descriptors import Component, Modality, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1
_PARTS = {
    "encoder": "Patches of a signal to features.",
    "projector": "Features to backbone width, one position each.",
    "codec": "Patches to two ids each, by rounding two learned numbers.",
    "autoencoder": "Patches to latents and back.",
    "generator": "Hidden states to a signal, by flow matching on latents.",
    "loss": "Squared error of reconstructions.",
}


@hookimpl
def xoron_components():
    return [
        Component(
            kind=kind,
            name=f"signal-{kind}",
            modality="signal",
            factory=f"xoron_toy.parts:Signal{kind.capitalize()}",
            config=f"xoron_toy.config:{kind.capitalize()}Config",
            summary=summary,
            token_groups=("xoron-toy/signal",),
        )
        for kind, summary in _PARTS.items()
    ]


@hookimpl
def xoron_modalities():
    return [
        Modality(
            name="signal",
            content_types=("signal",),
            begin="<|signal|>",
            end="<|/signal|>",
            gen_begin="<|gen_signal|>",
            gen_end="<|/gen_signal|>",
            placeholder="<|signal_pad|>",
            load="xoron_toy.config:load_signal",
            sample="xoron_toy.config:sample_signal",
        )
    ]


@hookimpl
def xoron_token_groups():
    names = ("signal", "/signal", "gen_signal", "/gen_signal", "signal_pad")
    tokens = {name.replace("/", "end_"): f"<|{name}|>" for name in names}
    return [TokenGroup("xoron-toy/signal", tokens)]
