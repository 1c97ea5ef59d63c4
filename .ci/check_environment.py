"""Asserts what CI promises of an environment, and prints what it found.

torch is the CPU build and neither torchvision nor torchaudio is there (their wheels for Linux
are CUDA builds that break beside a CPU torch). With `--wheels`, the named import packages come
from installed wheels, not from the source tree. With `--lowest`, what the packages require is
installed in its lowest declared version.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def problems(wheels: list[str]) -> list[str]:
    """What is wrong with this environment."""
    import torch

    found = []
    if torch.version.cuda is not None:
        found.append(f"torch {torch.__version__} is a CUDA build; expected the CPU build")
    for name in ("torchvision", "torchaudio"):
        if importlib.util.find_spec(name):
            found.append(f"{name} is installed; expected neither torchvision nor torchaudio")
    site = Path(sysconfig.get_path("purelib")).resolve()
    for name in wheels:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or site not in origin.parents:
            found.append(f"{name} comes from {origin}; expected it under {site}")
    return found


def above_the_lowest(names: list[str]) -> list[str]:
    """Requirements of distributions that are not installed in their lowest declared version.

    A lower bound that no installation can have proves nothing and misleads. Patch releases do not
    count, and torch is the workspace's own build unless another one was asked for.
    """
    found = []
    for name in names:
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            bounds = [s.version for s in requirement.specifier if s.operator == ">="]
            if requirement.marker or not bounds or requirement.name == "torch":
                continue
            installed = Version(importlib.metadata.version(requirement.name))
            if installed.release[:2] != (*Version(bounds[0]).release, 0)[:2]:
                found.append(
                    f"{name} declares {requirement}, and {installed} is the lowest that can be"
                    " installed; raise the bound"
                )
    return found


def main() -> int:
    """Prints the versions; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", nargs="*", default=[], metavar="PACKAGE")
    parser.add_argument("--lowest", action="store_true")
    options = parser.parse_args()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}", *options.wheels, flush=True)
    wrong = problems(options.wheels)
    if options.lowest:
        ours = {p.dist.name for p in importlib.metadata.entry_points(group="xoron") if p.dist}
        wrong += above_the_lowest(sorted(ours))
    for line in wrong:
        print(f"check_environment: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
