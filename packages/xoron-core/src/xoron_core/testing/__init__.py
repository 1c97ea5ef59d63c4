"""The conformance kit: does a plug-in work with every other plug-in?

    from xoron_core.testing import parametrize_with_checks

    @parametrize_with_checks("my-plugin")
    def test_conformance(check):
        check()

Every component that the plug-in offers is built from its `tiny` preset (or its default config), fed
with media that its modality's `sample` makes up (or with its own dummy batch), and held to what
`xoron_core.components` promises. The same checks run as `xoron plugins check NAME`.

Nothing heavy is imported before a check is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "parametrize_with_checks": "xoron_core.testing.run",
    "checks_for": "xoron_core.testing.run",
    "run_checks": "xoron_core.testing.run",
    "BoundCheck": "xoron_core.testing.run",
    "check": "xoron_core.testing.catalogue",
    "Check": "xoron_core.testing.catalogue",
    "CheckFailed": "xoron_core.testing.outcome",
    "CheckSkipped": "xoron_core.testing.outcome",
    "Report": "xoron_core.testing.outcome",
    "Result": "xoron_core.testing.outcome",
}

if TYPE_CHECKING:
    from xoron_core.testing.catalogue import Check, check
    from xoron_core.testing.outcome import CheckFailed, CheckSkipped, Report, Result
    from xoron_core.testing.run import (
        BoundCheck,
        checks_for,
        parametrize_with_checks,
        run_checks,
    )

__all__ = [
    "parametrize_with_checks",
    "checks_for",
    "run_checks",
    "BoundCheck",
    "check",
    "Check",
    "CheckFailed",
    "CheckSkipped",
    "Report",
    "Result",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'xoron_core.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
