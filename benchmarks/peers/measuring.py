# SPDX-License-Identifier: Apache-2.0
"""Seconds, memory and rates for the benchmarks of the solver; needs torch alone."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass
class Spent:
    seconds: float = 0.0
    extra: int = 0  # bytes of the peak beyond what was there before


@contextmanager
def measured(device: torch.device) -> Iterator[Spent]:
    """Seconds and peak memory of what is done inside: the allocator's on CUDA, else the resident size of the process."""
    spent = Spent()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present size
        before = resident("VmRSS")
    begin = time.perf_counter()
    yield spent
    wait(device)
    spent.seconds = time.perf_counter() - begin
    spent.extra = (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) - before


def resident(which: str) -> int:
    """Bytes, from the kernel's own count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Stopwatch:
    """Seconds by stage. It waits for the device at both ends of a stage; a stage inside another counts in both."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wait(self.device)
        begin = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def replacing(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Times every call of a function of a module or class, for as long as the `with` lasts."""
        function = getattr(owner, attribute)
        setattr(owner, attribute, self.wrap(name, function))
        try:
            yield
        finally:
            setattr(owner, attribute, function)


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 4096) -> float:
    """FLOP/s of a large square product, the best of three."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        wait(device)
        begin = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    names = ("torch", "triton", "transformers")
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device)}
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    tiles = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    return found | {"device": capabilities.get("cpu_name") or platform.processor(), "instructions": tiles}
