"""Proves that plug-ins add sub-commands to a group, imported only when used, that they take none of
the group's own away, and that one that is not installed answers with its pip line."""

import sys
import types

import pytest

from xoron_core.cli import app, groups, run
from xoron_core.descriptors import Command, Contribution, Origin
from xoron_core.plugins import Plugin, Registry
from xoron_core.plugins import registry as installed


@pytest.fixture
def offered(monkeypatch):
    """Core beside a plug-in that adds two sub-commands, one of them under a name of core's."""

    def count(number: int) -> None:
        """Count to a number.

        Example: xoron tokens count 3
        """
        print(*range(1, number + 1))

    module = types.ModuleType("made_up")
    module.count = count
    monkeypatch.setitem(sys.modules, "made_up", module)
    commands = (
        Command("tokens count", "made_up:count", "Count to a number."),
        Command("tokens lost", "not_there:lost", "Cannot be imported."),
        Command("tokens show", "not_there:show", "Never used."),
    )
    core = installed().plugin("core")
    plugin = Plugin(
        "made-up", "made_up", Origin("made-up", "1.0"), contribution=Contribution(commands=commands)
    )
    registry = Registry([core, plugin])
    for where in (app, groups):
        monkeypatch.setattr(where, "registry", lambda: registry)


def test_a_sub_command_of_a_plugin_runs(offered, capsys):
    assert run(["tokens", "count", "3"]) == 0
    assert capsys.readouterr().out == "1 2 3\n"
    assert run(["tokens", "count", "--help"]) == 0
    assert "Usage: xoron tokens count" in capsys.readouterr().out


def test_help_lists_it_without_an_import_and_the_root_does_not(offered, capsys):
    assert run(["tokens", "--help"]) == 0
    out = capsys.readouterr().out
    assert "count    Count to a number." in out
    assert "lost     Cannot be imported." in out
    assert "Show ranges" in out
    assert "Never used" not in out
    assert run(["--help"]) == 0
    assert "count" not in capsys.readouterr().out
    assert run(["tokens count"]) == 2
    assert "unknown command 'tokens count'" in capsys.readouterr().err


def test_one_that_cannot_be_imported_breaks_no_other(offered, capsys, tmp_path):
    assert run(["tokens", "lost"]) == 2
    assert "`xoron tokens lost` (not_there:lost) cannot be imported" in capsys.readouterr().err
    assert run(["tokens", "show", str(tmp_path / "no")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["build", "audit"])
def test_what_is_not_installed_names_its_package(offered, name, capsys):
    assert run(["tokens", name]) == 2
    assert capsys.readouterr().err == (
        f"error: `xoron tokens {name}` is not installed; run: pip install xoron-train\n"
    )


def test_an_unknown_sub_command_is_wrong_usage(offered, capsys):
    assert run(["tokens", "biuld"]) == 2
    assert "No such command 'biuld'" in capsys.readouterr().err
