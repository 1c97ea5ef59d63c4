"""Proves that every component of ours passes the conformance kit, and the toy plug-in with them.

The plug-ins of the workspace are found, not listed: a new one is held to the kit from its start.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from xoron_core.plugins import GROUP
from xoron_core.testing import checks_for, parametrize_with_checks
from xoron_core.testing.catalogue import checks

ROOT = Path(__file__).parents[1]
MEMBERS = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
OURS = sorted(
    point.name
    for point in importlib.metadata.entry_points(group=GROUP)
    if point.dist is not None and point.dist.metadata["Name"] in MEMBERS
)


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, id=f"{name}: {check.id}") for name in OURS for check in checks_for(name)],
)
def test_ours(check):
    check()


@parametrize_with_checks(str(ROOT / "tests" / "toy"))
def test_toy(check):
    check()


def test_nothing_of_ours_is_left_out():
    assert {"core", "llm", "train"} <= set(OURS)
    assert len(OURS) == len(MEMBERS)


def test_every_check_says_what_it_promises_and_names_checks_it_needs():
    every = checks()
    assert len(every) >= 20
    for check in every.values():
        assert check.summary
        assert check.since >= 1
        assert set(check.needs) <= set(every), check.id
