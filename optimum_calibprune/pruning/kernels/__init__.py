# SPDX-License-Identifier: Apache-2.0
"""The solver's kernels: `reference` says what they compute; which twin does it depends on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from . import blocked


@dataclass(frozen=True)
class Kernels:
    """Functions with the signatures and the results of their namesakes in `reference`; `name` stands in the reports."""

    name: str
    select_: Callable[..., None]
    sweep_: Callable[..., None]
    add_gram_: Callable[..., None]


TORCH = Kernels("torch", blocked.select_, blocked.sweep_, blocked.add_gram_)


@cache
def triton_kernels() -> Kernels | None:
    """Kernels in Triton for fp32, or None where it is not installed."""
    if find_spec("triton") is None:
        return None
    from . import triton_gram, triton_select, triton_sweep

    return Kernels("triton", triton_select.select_, triton_sweep.sweep_, triton_gram.add_gram_)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for tensors of `dtype` on `device`."""
    fast = triton_kernels() if device.type == "cuda" and dtype == torch.float32 else None
    return fast or TORCH
