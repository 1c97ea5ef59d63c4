"""Which contributions a composition brings into its token space.

Only what the composition names contributes: its tokenizer's base, the groups it selects, the groups
its components declare, and its codecs' ranges. What else is installed changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from xoron_core.composer.composition import Composition, load_factory
from xoron_core.composer.parts import build_tokenizer_part, typed_config
from xoron_core.descriptors import Modality, TokenGroup
from xoron_core.errors import CompositionError
from xoron_core.plugins import Registry
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_core.tokens.special_tokens import select


def allocate_space(
    composition: Composition, registry: Registry, lock: TokenSpace | None = None
) -> TokenSpace | None:
    """Allocates the token space of a composition, appending under `lock` if given.

    Returns:
        The space, or None where there is neither a tokenizer nor a codec.

    Raises:
        PluginError: if a group's or a component's package is missing.
        CompositionError: if a modality's markers are in no selected group.
        TokenSpaceError: if contributions collide, or the lock does not allow them.
    """
    text = _text_base(composition, registry)
    codecs = _codec_ranges(composition, registry)
    if text is None and not codecs:
        return None
    groups = select_groups(composition, registry)
    space = TokenSpace.allocate(text=text, groups=groups, codecs=codecs, lock=lock)
    if composition.of_kind("backbone"):
        _check_markers(composition, registry, space)
    return space


def select_groups(composition: Composition, registry: Registry) -> list[TokenGroup]:
    """The groups a composition names, and those its components need."""
    available = registry.token_groups()
    wanted = composition.tokens.groups
    # "all" is every group of core: a modality's groups come with its components.
    names = (
        [name for name in available if name.startswith("xoron-core/")]
        if wanted == "all"
        else list(wanted)
    )
    for slot in composition.slots.values():
        if slot.ref is None:
            names += registry.component(slot.kind, slot.use).token_groups
    return select(list(dict.fromkeys(names)), list(available.values()))


def used_modalities(composition: Composition, registry: Registry) -> dict[str, Modality]:
    """The modalities of a composition, with the placeholders and markers that it chose for them."""
    used = {slot.modality for slot in composition.slots.values()}
    placeholders, markers = composition.tokens.placeholders, composition.tokens.markers
    found = {}
    for name, modality in registry.modalities().items():
        if name in used:
            begin, end = markers.get(name, (modality.begin, modality.end))
            placeholder = placeholders.get(name, modality.placeholder)
            found[name] = replace(modality, begin=begin, end=end, placeholder=placeholder)
    return found


def _text_base(composition: Composition, registry: Registry) -> TextBase | None:
    tokenizers = composition.of_kind("tokenizer")
    if len(tokenizers) > 1:
        raise CompositionError(
            f"one tokenizer is expected, got {', '.join(tokenizers)}; keep one of them"
        )
    pretrained = any(slot.config.get("path") for slot in composition.of_kind("backbone").values())
    for name, slot in tokenizers.items():
        if pretrained and slot.config.get("base_specials") == "drop":
            raise CompositionError(
                f"slot {name!r}: base_specials: drop over pretrained weights would give the base's"
                " own special tokens new ids and new rows; write base_specials: keep"
            )
        return build_tokenizer_part(registry, name, slot).text_base()
    return None


def _codec_ranges(composition: Composition, registry: Registry) -> list[CodecRange]:
    ranges: list[CodecRange] = []
    for slot in composition.of_kind("codec").values():
        component = registry.component("codec", slot.use)
        ranges += load_factory(registry, component).ranges(typed_config(registry, slot))
    return ranges


def _check_markers(composition: Composition, registry: Registry, space: TokenSpace) -> None:
    strings = set(space.special_ids)
    for name, modality in used_modalities(composition, registry).items():
        markers = (
            modality.begin,
            modality.end,
            modality.gen_begin,
            modality.gen_end,
            modality.placeholder,
        )
        missing = [marker for marker in markers if marker not in strings]
        if missing:
            owners = sorted(
                group.name
                for group in registry.token_groups().values()
                if set(missing) & set(group.tokens.values())
            )
            raise CompositionError(
                f"modality {name!r} needs the markers {', '.join(missing)}, which no selected token"
                f" group has; add to tokens.groups: {', '.join(owners) or 'a group that has them'}"
            )
