"""Proves that a folder appears whole or not at all, whatever interrupts the writing."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from xoron_core import storage
from xoron_core.errors import FolderError
from xoron_core.storage import (
    atomic_file,
    atomic_folder,
    check_tensors,
    read_tensors,
    recover,
    write_tensors,
)


def write(folder, text):
    with atomic_folder(folder) as aside:
        (aside / "a").write_text(text)
        (aside / "b").write_text(text)


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")

    def fill_the_disk():
        with atomic_folder(folder) as aside:
            (aside / "a").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(FolderError, match=r"No space left.*intact"):
        fill_the_disk()
    assert (folder / "a").read_text() == (folder / "b").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_another_error_passes_through_and_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        _ = 1 / 0
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_kill_between_the_two_renames_is_recovered(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write(folder, "old")
    rename = type(folder).rename

    def killed(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "new")
    monkeypatch.undo()
    assert not folder.exists()
    recover(folder)
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_sigkill_at_any_moment_leaves_a_whole_folder(tmp_path):
    program = f"""
import sys
from xoron_core.storage import atomic_folder
for i in range(10**6):
    with atomic_folder({str(tmp_path / "model")!r}) as aside:
        for name in "abcdefgh":
            (aside / name).write_text(str(i))
    print(i, flush=True)
"""
    for delay in (0.02, 0.05, 0.11):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        child.stdout.readline()
        try:
            child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.wait()
        recover(tmp_path / "model")
        values = {(tmp_path / "model" / name).read_text() for name in "abcdefgh"}
        assert len(values) == 1


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with atomic_file(path) as aside:
        aside.write_text("old")

    def fill_the_disk():
        with atomic_file(path) as aside:
            aside.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(FolderError, match=r"a\.json: could not be written \(No space left"):
        fill_the_disk()
    with pytest.raises(ZeroDivisionError), atomic_file(path) as aside:
        aside.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_truncated_tensor_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.arange(1000.0)})
    torch.testing.assert_close(read_tensors(path)["w"], torch.arange(1000.0), rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-100])
    for reader in (read_tensors, check_tensors):
        with pytest.raises(FolderError, match=r"x\.safetensors.*truncated"):
            reader(path)
    with pytest.raises(FolderError, match="missing"):
        check_tensors(tmp_path / "y.safetensors")


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path):
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        tmp_path.chmod(mode)
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == expected


def test_storage_imports_no_torch():
    code = "import sys, xoron_core.storage; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert storage.__doc__
