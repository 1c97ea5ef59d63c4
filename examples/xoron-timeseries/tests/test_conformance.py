"""The conformance kit of xoron-core on everything that this plug-in contributes."""

from collections.abc import Callable

from xoron_core.testing import parametrize_with_checks


@parametrize_with_checks("timeseries")
def test_conformance(check: Callable[[], None]) -> None:
    check()
