# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: versions, hardware, peak memory."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version

import psutil
import torch

from . import __version__


def versions() -> dict[str, str]:
    """Of Python and of the libraries that have a say in the numbers."""
    names = ("torch", "transformers", "datasets", "lm-eval", "safetensors", "numpy")
    return {"optimum-calibprune": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def hardware(device: torch.device) -> dict[str, str]:
    """The processor and, where it is used, the GPU; no name of the machine."""
    found = {
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
