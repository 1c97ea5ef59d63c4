"""The whole hook surface of xoron-core. A plug-in module implements the hooks it needs:

    from xoron_core.hookspecs import hookimpl
    from xoron_core.descriptors import Component

    xoron_api = 1                      # the plug-in API this module was written for

    @hookimpl
    def xoron_components():
        return [Component(kind="encoder", name="ecg", ...)]

and is named by its distribution under the entry-point group `xoron`. Hooks return data; nothing
heavy is imported to answer them.
"""

from __future__ import annotations

from types import ModuleType

import pluggy

from xoron_core.descriptors import Command, Component, Modality, Preset, TokenGroup

API_VERSION = 1
hookspec = pluggy.HookspecMarker("xoron")
hookimpl = pluggy.HookimplMarker("xoron")


@hookspec
def xoron_components() -> list[Component]:  # type: ignore[empty-body]
    """Components that a composition can name."""


@hookspec
def xoron_modalities() -> list[Modality]:  # type: ignore[empty-body]
    """Kinds of media, how to load them and the markers of their spans."""


@hookspec
def xoron_token_groups() -> list[TokenGroup]:  # type: ignore[empty-body]
    """Groups of special tokens that a composition can select."""


@hookspec
def xoron_presets() -> list[Preset]:  # type: ignore[empty-body]
    """Named configurations shipped as package resources."""


@hookspec
def xoron_commands() -> list[Command]:  # type: ignore[empty-body]
    """Sub-commands of `xoron`."""


@hookspec
def xoron_hookspecs() -> list[ModuleType]:  # type: ignore[empty-body]
    """Modules with further hook specifications, for plug-ins of this plug-in."""
