# SPDX-License-Identifier: Apache-2.0
"""Starts the Space as on ZeroGPU, on a machine without CUDA: the real `spaces` asks for GPUs, forks, and hands results over;
of it only what would touch the driver is replaced. As there, torch says outside of a worker that CUDA is available."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import torch


def nothing(*args: object, **kwargs: object) -> int:
    return 0


def driver() -> ModuleType:
    found, there = ModuleType("spaces.zero.torch"), torch.cuda.is_available

    def patch() -> None:
        torch.cuda.is_available = lambda: True

    def unpatch() -> None:
        torch.cuda.is_available = there

    for name in ("enter_mode", "pack", "init", "size", "move", "is_in_bad_fork"):
        setattr(found, name, nothing)
    found.patch, found.unpatch = patch, unpatch
    return found


if __name__ == "__main__":
    sys.modules["spaces.zero.torch"] = driver()
    sys.path.insert(0, str(Path(__file__).parents[2] / "space"))
    runpy.run_path(str(Path(__file__).parents[2] / "space" / "app.py"), run_name="__main__")
