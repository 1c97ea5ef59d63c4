"""The errors a user can meet. Each carries one message: what was expected, what came, what to do.

`XoronError` and its children are printed by the command line without a traceback; their
`exit_code` becomes the process's: 1 for work that failed, 2 for wrong usage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class XoronError(Exception):
    """Something the user can mend. The message is the whole story."""

    exit_code = 1


class UsageError(XoronError):
    """The request itself is wrong: an unknown name, a bad key, a missing package."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is unknown, of the wrong type or inconsistent."""


class PluginError(UsageError):
    """A plug-in is unknown, absent, broken, incompatible or in conflict."""


class CompositionError(UsageError):
    """The chosen parts do not fit together."""


class FolderError(XoronError):
    """A model or checkpoint folder is missing, incomplete or damaged."""


class TokenSpaceError(XoronError):
    """Ids and their meanings do not agree."""


class SequenceError(XoronError):
    """Messages, placeholders and media do not agree."""


class DataError(XoronError):
    """Training data is missing, empty or unreadable."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest option, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
