"""Proves that a disk that fills up while a model, a checkpoint or metrics are written gives one
clear message and exit code 1, and that what was there before is intact.

The disk is real: a small file system in memory where it may be mounted; elsewhere the child process
may write no file beyond a size, which gives the same kind of error from the operating system.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xoron_core
from xoron_core.errors import FolderError

LIMIT = 12_000_000  # bytes of the file system
OPTIONS = ["--plugins", "llm", "--preset", "tiny", "--set", "backbone.num_layers=2"]
SMALL = [*OPTIONS, "--set", "backbone.hidden_size=48"]


class Disk:
    """A folder on which only so many bytes can still be written."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder = folder
        self.mounted = mounted
        self.file_limit: int | None = None

    def leave(self, free: int) -> None:
        """Fills the disk up so that `free` bytes are left."""
        self.empty()
        if not self.mounted:
            self.file_limit = free
            return
        status = os.statvfs(self.folder)
        size = status.f_bavail * status.f_frsize - free
        (self.folder / "ballast").write_bytes(bytes(max(size, 0)))

    def empty(self) -> None:
        """Makes room again."""
        (self.folder / "ballast").unlink(missing_ok=True)
        self.file_limit = None

    def xoron(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs the command in a process of its own."""
        program = "from xoron_core.cli import main; main()"
        if self.file_limit is not None:
            limits = f"resource.RLIMIT_FSIZE, ({self.file_limit}, {self.file_limit})"
            program = f"import resource; resource.setrlimit({limits}); {program}"
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LIMIT}", "tmpfs", str(folder)]
    mounted = bool(
        shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    )
    yield Disk(folder, mounted)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def saved(model, folder):
    """Saves; returns the message where that fails."""
    try:
        xoron_core.save(*model, folder)
    except FolderError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def small():
    """A small model and its processor."""
    return xoron_core.compose(
        plugins="llm", preset="tiny",
        overrides=["backbone.num_layers=2", "backbone.hidden_size=48"],
    )  # fmt: skip


def told(done, path):
    """One message that names the path and what to do."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {path}")
    assert "ree some space" in lines[0]


def test_composing_onto_a_full_disk_leaves_nothing(disk):
    disk.leave(500_000)
    target = disk.folder / "model"
    told(disk.xoron("compose", *SMALL, "-o", target), target)
    assert [path.name for path in disk.folder.iterdir() if path.name != "ballast"] == []
    disk.empty()
    assert disk.xoron("-q", "compose", *SMALL, "-o", target).returncode == 0


def test_composing_over_a_model_keeps_the_old_one(disk):
    target = disk.folder / "model"
    assert disk.xoron("-q", "compose", *SMALL, "--seed", "3", "-o", target).returncode == 0
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    disk.leave(700_000)
    done = disk.xoron("compose", *SMALL, "--seed", "4", "-o", target)
    told(done, target)
    assert f"What was at {target} before is intact" in done.stderr
    after = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert after == before
    xoron_core.load(target)
    assert not list(disk.folder.glob(".model*"))


def test_wherever_the_disk_fills_up_the_old_folder_stays(disk, small):
    """The last files of a folder are small ones, by other writers than the weights'."""
    if not disk.mounted:
        pytest.skip("needs a file system of its own, in this very process")
    target = disk.folder / "model"
    xoron_core.save(*small, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    space = target / "token_space.json"
    before, failed = space.read_bytes(), 0
    for free in (0, *range(size - 40_000, size + 40_000, 4096)):
        disk.leave(free)
        outcome = saved(small, target)
        failed += outcome is not None
        assert outcome is None or "intact" in outcome
        assert space.read_bytes() == before
        assert (target / "tokenizer.json").is_file()
        assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast", "model"]
    assert 5 < failed < 21, "the sweep has to cross the size of the folder"
    again, _ = xoron_core.load(target)
    for ours, theirs in zip(small[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def training(tmp_path, small):
    """A model folder and a recipe that writes a checkpoint every other step."""
    xoron_core.save(*small, tmp_path / "start")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"line {number} of the corpus\n" * 12)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: full\nmixture: {{own: {{kind: files, path: {corpus}}}}}\neval_fraction: 0.2\n"
        "sequence_length: 32\nbatch_size: 2\nmax_steps: 4\nsave_every: 2\nlog_every: 1\n"
        "learning_rate: 0.01\n"
    )
    return [recipe, "--model", tmp_path / "start"]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_resumes(disk, training):
    run = disk.folder / "run"
    disk.leave(5_000_000 if disk.mounted else 2_000_000)
    done = disk.xoron("-q", "train", *training, "-o", run)
    told(done, run / "checkpoints" / f"step-0000000{4 if disk.mounted else 2}")
    stand = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert stand == (["step-00000002"] if disk.mounted else [])
    disk.empty()
    done = disk.xoron("-q", "train", *training, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    xoron_core.load(run / "model")


def test_metrics_that_do_not_fit_are_one_message_too(disk, training):
    run = disk.folder / "run"
    disk.leave(4096 if disk.mounted else 200)
    done = disk.xoron("-q", "train", *training, "-o", run)
    told(done, run)
    assert "--resume" in done.stderr or "another -o folder" in done.stderr
