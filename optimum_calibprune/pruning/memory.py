# SPDX-License-Identifier: Apache-2.0
"""The host's memory: how much is free, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def free_memory() -> int:
    """What this process may still take, in bytes: of the machine, or of the container that it runs in, whose page cache counts
    as free; its share, where several processes of one launcher are on the machine."""
    import psutil  # here, so that what needs no plan can do without

    group, free = Path("/sys/fs/cgroup"), psutil.virtual_memory().available
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(counted.get("inactive_file", 0)) + int(counted.get("active_file", 0))
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()) + cache)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


LARGE = 2**22  # bytes from which on a tensor has pages of its own
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def be_frugal() -> None:
    """Makes glibc give each large tensor pages of its own, which go back to the system with it; else it raises that limit to 32
    MB by and by, and what is freed below it stays in the process."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # other C libraries have no need of it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Makes glibc give freed memory back to the system."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
