"""CPU time of the light path: `import xoron_core` and `xoron plugins list`.

Each side is a fresh process; a bare interpreter runs in every round as the floor. The first
round, which may write byte code, is thrown away. Without `--smoke` the exit code is 1 when
`xoron plugins list` takes more than its promise of 0.3 CPU seconds.

    hatch run bench startup
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.harness import arguments, children_seconds, compare, say

LIMIT = 0.3
COMMAND = "xoron plugins list"


def process(*args: str) -> Callable[[], object]:
    """A side that runs this Python with `args` and fails where the process fails."""
    # One BLAS thread: the number of worker threads is no part of what is measured.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> None:
        subprocess.run(
            [sys.executable, *args], check=True, stdout=subprocess.DEVNULL, env=environment
        )

    return run


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(__doc__.splitlines()[0], rounds=9).parse_args()
    sides = {
        "bare interpreter": process("-c", "pass"),
        "import xoron_core": process("-c", "import xoron_core"),
        COMMAND: process("-c", "from xoron_core.cli import main; main()", "plugins", "list"),
    }
    rounds = 1 if options.smoke else options.rounds
    report = compare(sides, rounds=rounds, clock=children_seconds)
    print(report.json() if options.json else report.table())
    taken = report.sides[COMMAND].seconds
    if options.smoke or taken <= LIMIT:
        return 0
    say(f"{COMMAND}: {taken:.3f} CPU seconds, more than {LIMIT}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
