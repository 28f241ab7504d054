# SPDX-License-Identifier: Apache-2.0
"""How many kernels a piece of code launches: counted by the profiler on CUDA, as calls of aten operators elsewhere.

An aten operator launches one kernel or more (a sort or a factorisation several), so the second count is a lower bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


# Operators that launch nothing although their results are no views, and those that only wait and copy one number to the host.
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_")
WAITS = ("_local_scalar_dense",)


@dataclass(frozen=True)
class Launches:
    """Kernels by name (names of aten operators unless counted on CUDA), without copies, fills and waits of the driver."""

    by_name: dict[str, int]
    counted: str  # "cuda kernels" or "aten calls"

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


@dataclass(frozen=True)
class SolveLaunches:
    """Of a solver that works window by window: what a whole matrix costs and what one more window adds."""

    columns: int
    block: int  # columns of a window
    counted: str
    total: int  # of a matrix of so many columns
    per_block: int  # what one more window adds
    per_column: float
    fixed: int  # what does not grow with the columns: preparation, factorisation, result
    per_block_by_name: dict[str, int]


def count(run: Callable[[], object], device: torch.device | str) -> Launches:
    """Runs it once; on CUDA run it before, so that nothing is set up on the way."""
    if torch.device(device).type != "cuda":
        counter = AtenCounter()
        with counter:
            run()
        return Launches(dict(counter.calls.most_common()), "aten calls")

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize(device)
    on_device = (e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    names = Counter(e.name for e in on_device if not e.is_user_annotation)
    kernels = {name: calls for name, calls in names.most_common() if not name.startswith(("Memcpy", "Memset"))}
    return Launches(kernels, "cuda kernels")


def of_solve(
    prepare: Callable[[int], Callable[[], object]], device: torch.device | str, block: int = 128
) -> SolveLaunches:
    """Counts a solve of three and of four windows.

    Args:
        prepare: makes inputs of so many columns and returns the solve of them, which alone is counted.
    """
    if torch.device(device).type == "cuda":
        prepare(block)()
    fewer, more = (count(prepare(windows * block), device) for windows in (3, 4))
    added = Counter(more.by_name)
    added.subtract(fewer.by_name)
    per_block = more.total - fewer.total
    return SolveLaunches(
        columns=4 * block,
        block=block,
        counted=more.counted,
        total=more.total,
        per_block=per_block,
        per_column=per_block / block,
        fixed=more.total - 4 * per_block,
        per_block_by_name={name: calls for name, calls in added.most_common() if calls},
    )


class AtenCounter(TorchDispatchMode):
    """Counts the calls of aten operators that would launch a kernel: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        if not is_view(func) and name not in (*NO_KERNEL, *WAITS) and not (name == "copy_" and is_same(*args[:2])):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether a result shares memory with an argument that is not written to."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_same(target: Tensor, source: Tensor) -> bool:
    """Whether a copy has nothing to do: `x[a:b] -= y` ends in a copy of a view onto itself, which torch leaves out."""
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (target, source)]
    return places[0] == places[1]
