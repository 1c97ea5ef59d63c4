"""Examines the machine: Python, processors, accelerators and free memory. Imports torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from xoron_core.doctor.finding import Finding


def examine_machine() -> Iterator[Finding]:
    """Devices and memory; an absent accelerator is a note."""
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("machine", "Python", "ok", system)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "CPU", "ok", f"{cores} cores, torch uses {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Finding("machine", f"CUDA {index}", "ok", _cuda(index))
    else:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, no device is usable" if built else "a CPU build"
        yield Finding("machine", "CUDA", "note", f"none ({why})")
    if torch.backends.mps.is_available():
        yield Finding("machine", "MPS", "ok", "usable")
    free = free_memory()
    shown = "unknown on this system" if free is None else size(free)
    yield Finding("machine", "free memory", "ok" if free else "note", shown)


def free_memory() -> int | None:
    """Bytes of main memory that a new process may take, or None where that cannot be known.

    The smaller of what the system has available and what the control group (a container's limit)
    still allows.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return _free_pages()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def size(count: float) -> str:
    """Bytes with a decimal unit, as `xoron inspect` writes them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _free_pages() -> int | None:
    """Free memory where there is no /proc: by sysconf, which not every system answers."""
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cuda(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return f"{name}, capability {major}.{minor}, {size(free)} of {size(total)} free"
