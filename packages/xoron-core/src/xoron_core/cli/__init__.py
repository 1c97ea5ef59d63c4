"""The `xoron` command.

`main` answers `xoron plugins list` and `--version` without importing typer (its import costs more
than finding the plug-ins); everything else goes through `xoron_core.cli.app`. Results go
to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from xoron_core.errors import XoronError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits the process."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; a user's mistake is one message."""
    try:
        if arguments[:2] == ["plugins", "list"] and set(arguments[2:]) <= {"--json"}:
            from xoron_core.cli.plugin_list import print_list

            print_list(as_json="--json" in arguments)
            return 0
        if arguments == ["--version"]:
            from xoron_core import __version__

            print(f"xoron {__version__}")
            return 0
        from xoron_core.cli.app import invoke

        return invoke(arguments)
    except XoronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`xoron ... | head`); nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
