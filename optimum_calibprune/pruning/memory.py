# SPDX-License-Identifier: Apache-2.0
"""The host's memory: how much is free, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def free_memory() -> int:
    """What this process may still take, in bytes: of the machine, or of the container that it runs in."""
    import psutil  # here, so that a GPU machine can do without

    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    free = psutil.virtual_memory().available
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def give_back() -> None:
    """Makes glibc give freed memory back to the system; else tensors below 32 MB that were freed stay in the process."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no need of it
        if trim is not None:
            trim(0)
