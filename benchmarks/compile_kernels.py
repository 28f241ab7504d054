# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels become on a GPU: registers, spills, shared memory. Needs Triton, but no GPU.

    python benchmarks/compile_kernels.py [--capability 90] [--patterns 0:0 2:4 ...] [--by-row]

The kernels are called as the solver calls them, and compiled for a GPU of that compute capability (90 is Hopper) instead
of run; `--by-row` gives them tensors of the other layout. Spills are bytes a lane; programs are those that fit into one
multiprocessor of an H100 at a time.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from optimum_calibprune.pruning.kernels.triton_gram import add_gram_
from optimum_calibprune.pruning.kernels.triton_select import select_
from optimum_calibprune.pruning.kernels.triton_sweep import sweep_


ROWS, COLUMNS, WINDOW = 4096, 4096, 128
REGISTERS, SHARED, WARPS = 65536, 227 * 1024, 64  # of a multiprocessor
PATTERNS = ["0:0", "1:4", "2:4", "4:8", "8:16", "3:5", "32:64", "30:100", "64:128"]  # 0:0 is unstructured


@contextmanager
def compiled(capability: int) -> Iterator[list[dict]]:
    """Inside, kernels are compiled where they would be launched; the list fills with what became of them."""
    found: list[dict] = []

    def compile_instead(self: JITFunction, grid: tuple[int, ...]) -> object:
        def launch(*args: object, **options: object) -> None:
            self.device_caches.clear()  # what was compiled before brings no log
            log, begin = io.StringIO(), time.perf_counter()
            with redirect_stdout(log):
                kernel = self.run(*args, grid=grid, warmup=True, **options)
            found.append(resources(kernel, log.getvalue(), time.perf_counter() - begin))

        return launch

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(target)
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    original, JITFunction.__getitem__ = JITFunction.__getitem__, compile_instead
    try:
        yield found
    finally:
        JITFunction.__getitem__ = original


def resources(kernel: object, log: str, seconds: float) -> dict:
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    limits = [REGISTERS // (32 * warps * (-registers // 8 * -8)), WARPS // warps, 32]
    limits += [SHARED // shared] if shared else []
    return {
        "kernel": kernel.metadata.name,
        "warps": warps,
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "instructions": instructions(kernel.asm["cubin"]),
        "programs": min(limits),
        "seconds": f"{seconds:.1f}",
    }


def instructions(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE))


def show(name: str, found: list[dict]) -> None:
    for row in found:
        print(f"{name:14}", *(f"{value!s:>12}" for value in row.values()), flush=True)
    found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--by-row", action="store_true")
    arguments = parser.parse_args()

    def zeros(rows: int, columns: int, dtype: torch.dtype, by_row: bool) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=dtype) if by_row else torch.zeros(columns, rows, dtype=dtype).t()

    W, errors, mask = (
        zeros(ROWS, WINDOW, dtype, arguments.by_row) for dtype in (torch.float32, torch.float32, torch.bool)
    )
    factor = torch.zeros(COLUMNS, COLUMNS)
    with compiled(arguments.capability) as found:
        heads = ("kernel", "warps", "registers", "spills", "shared", "instructions", "programs", "seconds")
        print(f"{'':14}", *(f"{head:>12}" for head in heads))
        for pattern in arguments.patterns:
            n, m = (int(number) for number in pattern.split(":"))
            window = slice(0, WINDOW - WINDOW % (m or 1))
            sweep_(W[:, window], errors[:, window], mask[:, window], factor[window, window], n, m)
            show(f"sweep {pattern}", found)
        select_(mask, W, factor[:WINDOW, :WINDOW].diagonal(), (ROWS,), (ROWS * WINDOW // 2,))
        show("select", found)
        for dtype in (torch.bfloat16, torch.float16):
            add_gram_(factor, zeros(64, COLUMNS, dtype, by_row=not arguments.by_row))  # its columns are contiguous
            show(f"gram {dtype}".replace("torch.", ""), found)


if __name__ == "__main__":
    main()
