"""The special tokens of the published system: named, selectable groups, each with an owner.

The data is `special_tokens.json`: groups in canonical order, each owned by the distribution that
contributes it, and aliases (another spelling of a string or name, for lookups only). The markers
`<|audio|>` and `<|/audio|>` sit in core's `multimodal` beside those of image and video, because
core's template writes them; the group `voice` of xoron-audio keeps listen and speak. Music's key
is `<|key_signature|>`; `<|key|>` is the key of structured data.

Footguns
- `hidden` names mark what `strip_hidden_tokens` removes. A hidden *begin* takes its content along;
  text generated behind a prompt that already opened a hidden block starts inside it, so put the
  opening marker in front before stripping.
- Being in this list gives a token no id: only groups that a composition selects get ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from xoron_core.descriptors import TokenGroup
from xoron_core.errors import ConfigError, PluginError, did_you_mean

CORE = "xoron-core"


@dataclass(frozen=True)
class CatalogueGroup:
    """One group of the catalogue.

    Attributes:
        key: short name, e.g. `control`.
        title: what it is for, in a few words.
        owner: the distribution that contributes it.
        tokens: token name to string, in canonical order.
        hidden: names that are stripped from shown text.
    """

    key: str
    title: str
    owner: str
    tokens: Mapping[str, str]
    hidden: frozenset[str]

    @property
    def name(self) -> str:
        """`distribution/group`."""
        return f"{self.owner}/{self.key}"

    def group(self) -> TokenGroup:
        """Returns it as a plug-in contributes it."""
        return TokenGroup(self.name, dict(self.tokens), self.hidden)


@cache
def _data() -> dict[str, Any]:
    file = resources.files("xoron_core.tokens").joinpath("special_tokens.json")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


@cache
def catalogue() -> tuple[CatalogueGroup, ...]:
    """Returns every group of the published system in canonical order, whoever owns it."""
    return tuple(
        CatalogueGroup(g["key"], g["title"], g["owner"], g["tokens"], frozenset(g["hidden"]))
        for g in _data()["groups"]
    )


def groups_of(owner: str) -> list[TokenGroup]:
    """Returns the groups that a distribution of ours contributes, e.g. `xoron-audio`."""
    return [entry.group() for entry in catalogue() if entry.owner == owner]


def core_groups() -> list[TokenGroup]:
    """Returns the groups that xoron-core contributes."""
    return groups_of(CORE)


@cache
def _core_index() -> dict[str, int]:
    return {entry.name: i for i, entry in enumerate(catalogue()) if entry.owner == CORE}


def core_order(group: str) -> tuple[int, int, str]:
    """Returns the sort key of a group name: core's declared order first, then by name."""
    index = _core_index().get(group)
    if index is not None:
        return (0, index, "")
    return (1 if group.startswith(f"{CORE}/") else 2, 0, group)


def select(
    names: Sequence[str] | Literal["all"],
    available: Iterable[TokenGroup] | Mapping[str, TokenGroup],
) -> list[TokenGroup]:
    """Returns the named groups in canonical order.

    Args:
        names: `distribution/group`, or `group` alone for core's group of that name or else the
            only available one; `all` takes every available group.
        available: what the loaded plug-ins contribute, also by name.

    Raises:
        ConfigError: if a name is unknown or means several groups.
        PluginError: if its owner is one of our packages that is not loaded.
    """
    groups = available.values() if isinstance(available, Mapping) else available
    by_name = {group.name: group for group in groups}
    if isinstance(names, str):
        if names != "all":
            raise ConfigError(f"token groups must be a list of names or 'all', got {names!r}")
        chosen = set(by_name)
    else:
        chosen = {_full_name(name, by_name) for name in names}
    return [by_name[name] for name in sorted(chosen, key=core_order)]


def _full_name(name: str, available: Mapping[str, TokenGroup]) -> str:
    if name in available:
        return name
    if f"{CORE}/{name}" in available:
        return f"{CORE}/{name}"
    matches = sorted(full for full in available if full.partition("/")[2] == name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(
            f"token group {name!r} is contributed by several: write one of {', '.join(matches)}"
        )
    for entry in catalogue():
        if name in (entry.key, entry.name):
            raise PluginError(
                f"token group {name!r} belongs to {entry.owner}, which is not loaded;"
                f" pip install {entry.owner}"
            )
    short = [full.partition("/")[2] for full in available]
    known = [e.key for e in catalogue()]
    raise ConfigError(
        f"unknown token group {name!r}.{did_you_mean(name, [*short, *available, *known])}"
        f" Available: {', '.join(sorted(short))}."
    )


def pairs(tokens: Mapping[str, str]) -> dict[str, str]:
    """Returns begin string to end string.

    Two tokens are a pair if they are named `x_start` (or `x_begin`, or `x`) and `x_end`, or
    written `<|x|>` and `<|/x|>`.
    """
    found: dict[str, str] = {}
    strings = set(tokens.values())
    for name, string in tokens.items():
        stem = re.sub("_(start|begin)$", "", name)
        written = f"<|/{string[2:]}" if string.startswith("<|") else ""
        if (end := tokens.get(f"{stem}_end")) is not None and end != string:
            found[string] = end
        elif written in strings:
            found[string] = written
    return found


def hidden_markers(groups: Iterable[TokenGroup]) -> dict[str, str | None]:
    """Returns each hidden string: a begin with its end, everything else with None."""
    found: dict[str, str | None] = {}
    for group in groups:
        ends = pairs(group.tokens)
        for name, string in group.tokens.items():
            if name in group.hidden:
                found[string] = ends.get(string)
    return found


def strip_hidden_tokens(text: str, *, hidden: Mapping[str, str | None] | None = None) -> str:
    """Removes internal content from output.

    A hidden block goes from its begin to its matching end, blocks of the same kind may nest; one
    that is never closed goes to the end of the text. Hidden markers that stand alone are removed,
    everything else is left as it is, white space included.

    Args:
        text: generated text with its special tokens written out.
        hidden: what is hidden (`hidden_markers`, `TokenSpace.hidden`); by default, what the
            catalogue hides.
    """
    ends = _catalogue_hidden() if hidden is None else hidden
    if not ends:
        return text
    marks = sorted({*ends, *(end for end in ends.values() if end)}, key=len, reverse=True)
    kept: list[str] = []
    opener, depth, position = "", 0, 0
    for match in re.finditer("|".join(map(re.escape, marks)), text):
        mark = match.group()
        if depth == 0:
            kept.append(text[position : match.start()])
            position = match.end()
            if ends.get(mark) is not None:
                opener, depth = mark, 1
        elif mark == opener:
            depth += 1
        elif mark == ends[opener]:
            depth -= 1
            position = match.end()
    if depth == 0:
        kept.append(text[position:])
    return "".join(kept)


@cache
def _catalogue_hidden() -> dict[str, str | None]:
    return hidden_markers(entry.group() for entry in catalogue())


def _strings(*keys: str) -> dict[str, str]:
    return {
        name: string
        for entry in catalogue()
        if not keys or entry.key in keys
        for name, string in entry.tokens.items()
    }


ALIASES: Mapping[str, str] = _data()["aliases"]
SPECIAL_TOKENS: dict[str, str] = _strings()
REASONING_TOKENS: dict[str, str] = _strings("reasoning")
UNCERTAINTY_TOKENS: dict[str, str] = _strings("uncertainty")


def get_special_tokens_list() -> list[str]:
    """Returns every string of the catalogue, in canonical order."""
    return list(SPECIAL_TOKENS.values())


def get_reasoning_tokens() -> dict[str, str]:
    """Returns name to string of the group `reasoning`."""
    return dict(REASONING_TOKENS)
