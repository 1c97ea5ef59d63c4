"""Puts made-up distributions with plug-ins on the path, as an installation would."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from xoron_core import plugins

GOOD = """
from xoron_core.descriptors import Component
from xoron_core.hookspecs import hookimpl

xoron_api = 1


@hookimpl
def xoron_components():
    return [Component(kind="encoder", name="NAME", modality="NAME", factory="x:X", config="x:C",
                      summary="An encoder.")]
"""


TOY = Path(__file__).parent / "toy"


@contextmanager
def toy_installed() -> Iterator[None]:
    """The toy plug-in, discovered on the path as an installed one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOY))
        plugins.registry.cache_clear()
        yield
    plugins.registry.cache_clear()


def install(
    site: Path,
    name: str,
    source: str | None = GOOD,
    *,
    version: str = "1.0",
    requires: tuple[str, ...] = (),
    direct_url: dict[str, Any] | None = None,
) -> None:
    """Writes `xoron-NAME` with one entry point into a folder of the path.

    Args:
        site: the folder.
        name: of the plug-in.
        source: of its module, in which NAME stands for the name; None writes no module.
        version: of the distribution.
        requires: its requirements.
        direct_url: what pip stores of an installation from a folder.
    """
    module = f"fake_{name}"
    if source is not None:
        (site / f"{module}.py").write_text(textwrap.dedent(source).replace("NAME", name))
    info = site / f"xoron_{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: xoron-{name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[xoron]\n{name} = {module}\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    sys.modules.pop(module, None)
    importlib.invalidate_caches()
