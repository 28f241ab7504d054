# SPDX-License-Identifier: Apache-2.0
"""How fp32 products are computed, for as long as a `with` lasts; the caller's settings come back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 matrices are those of fp32, whatever the caller has allowed (TF32, bf16)."""
    with _fp32_products(torch.backends.cuda.matmul, "ieee"), _fp32_products(torch.backends.mkldnn.matmul, "ieee"):
        yield


@contextmanager
def exact_bf16_inputs() -> Iterator[None]:
    """The fp32 matrices that are multiplied on the CPU hold bf16 numbers: their tiles may be multiplied as such, which
    changes no product, and are summed in fp32."""
    with _fp32_products(torch.backends.mkldnn.matmul, "bf16" if _bf16_tiles() else "ieee"):
        yield


@contextmanager
def _fp32_products(backend: object, precision: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


@cache
def _bf16_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles (AMX); without them bf16 products are slower than those of fp32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False
