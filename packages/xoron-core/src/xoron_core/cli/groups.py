"""Groups of the command line that plug-ins add sub-commands to, each imported when it is used.

A plug-in's `Command("tokens build", ...)` is the sub-command `build` of the group `tokens`, if the
group's application is made with `cls=ExtensibleGroup`. A group's own sub-commands stay its own.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from xoron_core import advice
from xoron_core.descriptors import Command, resolve
from xoron_core.errors import PluginError
from xoron_core.plugins import registry


class ExtensibleGroup(TyperGroup):
    """A group of its own sub-commands and of those that plug-ins offer under `GROUP NAME`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all sub-commands, its own first."""
        return [*self.commands, *self._added()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The sub-command, imported now if it is a plug-in's, or None for an unknown name.

        Raises:
            PluginError: for one of a package of ours that is not installed.
        """
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        name = f"{self.name} {cmd_name}"
        if cmd_name in self._added() or advice.install_command(name):
            return load_command(plugin_command(name))
        return None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Lists the sub-commands, those of plug-ins from their descriptors."""
        limit = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        rows = [(name, own.get_short_help_str(limit)) for name, own in self.commands.items()]
        rows += [(name, command.help) for name, command in self._added().items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _added(self) -> dict[str, Command]:
        """What plug-ins add, by the word behind the group's."""
        prefix = f"{self.name} "
        return {
            name.removeprefix(prefix): command
            for name, command in registry().commands().items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in self.commands
        }


def plugin_command(name: str) -> Command:
    """A command that a plug-in offers, by its whole name.

    Raises:
        PluginError: if none does, naming the package where it is one of ours.
    """
    if (found := registry().commands().get(name)) is not None:
        return found
    package = advice.install_command(name)
    install = f"; run: pip install {package}" if package else ""
    raise PluginError(f"`xoron {name}` is not installed{install}")


def load_command(command: Command) -> Any:
    """Imports a plug-in's command or group.

    Raises:
        PluginError: if that fails.
    """
    try:
        target = resolve(command.target)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"`xoron {command.name}` ({command.target}) cannot be imported:"
            f" {type(error).__name__}: {error}"
        ) from error
    name = command.name.rpartition(" ")[2]
    if isinstance(target, typer.Typer):
        loaded = typer.main.get_command(target)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name=name)(target)
        loaded = typer.main.get_command(single)
    loaded.name = name
    return loaded
