"""Proves that every component keeps what `xoron_core.components` promises: the conformance kit."""

from xoron_core.testing import parametrize_with_checks


@parametrize_with_checks("audio")
def test_conformance(check):
    check()
