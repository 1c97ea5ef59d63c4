"""A mutant: a plug-in that is right but for one place, and the one check that has to find it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: of the fault.
        file: the source file of the base plug-in that it is in.
        old: what stands there; must occur exactly once.
        new: what the fault writes instead.
        caught_by: id of the check that has to fail, and no other of the same component or of the
            plug-in as a whole.
        says: words of its message.
        more: further (file, text) written beside, e.g. a preset.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str
    says: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()

    def write(self, base: Path, package: str, folder: Path) -> Path:
        """Writes the plug-in with its fault as a package of its own name; returns the folder."""
        own = f"{package}_{self.name.replace('-', '_')}"
        for source in base.rglob("*"):
            if source.suffix not in (".py", ".txt", ".yaml", "") or not source.is_file():
                continue
            text = source.read_text(encoding="utf-8")
            if source.name == self.file:
                assert text.count(self.old) == 1, (self.name, text.count(self.old))
                text = text.replace(self.old, self.new)
            # A name of its own, or the modules of one mutant would be those of the next.
            text = text.replace(package, own)
            target = folder / str(source.relative_to(base)).replace(package, own)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        for name, text in self.more:
            (folder / own / name).write_text(text, encoding="utf-8")
        return folder
