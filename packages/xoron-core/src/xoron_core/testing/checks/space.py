"""What a plug-in brings into the token space: special tokens, codec ranges, modality markers."""

from __future__ import annotations

from collections import Counter

from xoron_core.descriptors import Modality, resolve
from xoron_core.errors import ConfigError, PluginError, TokenSpaceError
from xoron_core.testing.catalogue import PLUGIN, check
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.subject import TEXT, Subject
from xoron_core.testing.target import Target
from xoron_core.tokens.space import CodecRange, TokenSpace


@check(
    "token-groups",
    PLUGIN,
    since=1,
    summary="token groups and codec ranges fit beside all of core's",
    needs=("loads",),
)
def token_groups(target: Target) -> None:
    contribution = target.plugin.contribution
    own = contribution.token_groups
    codecs = [c for c in contribution.components if c.kind == "codec"]
    if not own and not codecs:
        raise CheckSkipped("the plug-in brings no token")
    for group in own:
        twice = [string for string, n in Counter(group.tokens.values()).items() if n > 1]
        if twice:
            raise CheckFailed(
                f"xoron_token_groups: {group.name!r} gives the string {twice[0]!r} to two names;"
                " one string has one id"
            )
        if unknown := set(group.hidden) - set(group.tokens):
            raise CheckFailed(
                f"xoron_token_groups: {group.name!r} hides {sorted(unknown)}, which it does not"
                " have; `hidden` holds names of `tokens`"
            )
    ranges: list[CodecRange] = []
    for component in codecs:
        subject = Subject(target, component)
        try:
            ranges += subject.cls.ranges(subject.config)
        except (PluginError, ConfigError):
            continue  # the codec's own checks name it
    core = target.registry.plugin("core").contribution.token_groups
    groups = {group.name: group for group in (*core, *own)}
    try:
        TokenSpace.allocate(text=TEXT, groups=list(groups.values()), codecs=ranges)
    except TokenSpaceError as error:
        raise CheckFailed(
            f"xoron_token_groups or Codec.ranges do not fit beside core's tokens: {error}"
        ) from error


@check(
    "modalities",
    PLUGIN,
    since=1,
    summary="modalities are complete: markers that a group holds, a loader, named content types",
    needs=("loads",),
)
def modalities(target: Target) -> None:
    contribution = target.plugin.contribution
    known = target.registry.modalities()
    for modality in contribution.modalities:
        _check_modality(target, modality)
    for component in contribution.components:
        if component.kind in ("backbone", "tokenizer", "fusion", "loss"):
            continue
        if component.modality not in known:
            raise CheckFailed(
                f"{component.key} is of modality {component.modality!r}, which no installed plug-in"
                f" declares (there are: {', '.join(known) or 'none'}); return it from"
                " xoron_modalities, or depend on the package that does"
            )
    groups = target.registry.token_groups()
    for component in contribution.components:
        if absent := [name for name in component.token_groups if name not in groups]:
            raise CheckFailed(
                f"{component.key} needs the token group {absent[0]!r}, which no installed plug-in"
                " returns from xoron_token_groups"
            )


def _check_modality(target: Target, modality: Modality) -> None:
    where = f"xoron_modalities: {modality.name!r}"
    fields = ("begin", "end", "gen_begin", "gen_end", "placeholder")
    markers = {field: getattr(modality, field) for field in fields}
    if len(set(markers.values())) < len(markers):
        raise CheckFailed(f"{where}: its five markers must be different strings, got {markers}")
    groups = target.registry.token_groups().values()
    strings = {string for group in groups for string in group.tokens.values()}
    for field, marker in markers.items():
        if marker not in strings:
            raise CheckFailed(
                f"{where}: {field} is {marker!r}, which is in no token group; return it from"
                " xoron_token_groups"
            )
    if not modality.content_types:
        raise CheckFailed(f"{where}: content_types is empty, so no message can carry it")
    for field in ("load", "sample"):
        reference = getattr(modality, field)
        if not reference and field == "sample":
            continue
        try:
            resolved = resolve(reference)
        except (ImportError, AttributeError, ValueError) as error:
            raise CheckFailed(
                f"{where}: {field} is {reference!r}, which cannot be imported"
                f" ({type(error).__name__}: {error}); write 'package.module:function'"
            ) from error
        if not callable(resolved):
            raise CheckFailed(f"{where}: {field} names {reference!r}, which is no function")
    if modality.sample:
        load, sample = resolve(modality.load), resolve(modality.sample)
        load(sample(0, 1))
