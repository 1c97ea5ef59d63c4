"""The typer application: a group whose sub-commands come from the plug-ins and load when called."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from xoron_core import __version__, advice
from xoron_core.cli.groups import load_command
from xoron_core.cli.plugins import app as plugins_app
from xoron_core.errors import PluginError, UsageError, did_you_mean
from xoron_core.plugins import registry

logger = logging.getLogger("xoron")


class PluginGroup(TyperGroup):
    """Looks sub-commands up in the plug-in registry; imports one only when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands; one with a space belongs to a group (`cli.groups`)."""
        return ["plugins", *(name for name in registry().commands() if " " not in name)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now.

        Raises:
            UsageError: for an unknown name.
        """
        if cmd_name == "plugins":
            return typer.main.get_command(plugins_app)
        commands = registry().commands()
        if cmd_name in self.list_commands(ctx):
            return load_command(commands[cmd_name])
        if " " not in cmd_name and (package := advice.install_command(cmd_name)):
            raise PluginError(f"`xoron {cmd_name}` is not installed; run: pip install {package}")
        names = self.list_commands(ctx)
        raise UsageError(
            f"unknown command {cmd_name!r}.{did_you_mean(cmd_name, names)}"
            f" There are: {', '.join(names)}."
        )

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Lists the commands from their descriptors, without importing them."""
        rows = [("plugins", "List, show, check or start plug-ins.")]
        commands = registry().commands().values()
        rows += [(command.name, command.help) for command in commands if " " not in command.name]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=PluginGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help=(
        "Compose, train and run any-to-any multimodal models from installed plug-ins.\n\n"
        "Example: xoron compose --plugins llm --preset tiny -o out/"
    ),
)


def _version(value: bool) -> None:
    if value:
        print(f"xoron {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only what is wrong.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sets up the one logger."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    if not verbose:
        _hush_transformers()


def _hush_transformers() -> None:
    """Its progress bars and warnings are not our user's concern unless asked for."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def invoke(arguments: list[str]) -> int:
    """Runs the application; usage errors print their help line and give 2."""
    command = typer.main.get_command(app)
    try:
        command.main(arguments, prog_name="xoron", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
