# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202
"""`reference.select_` in Triton: a radix select of all matrices together, in four launches, without the host waiting.

Bits of non-negative fp32 numbers are ordered as integers. Three launches count the scores of each matrix by their first
11 bits, then, of those that share the first 11 bits of the threshold, by the next 10, then by the last 10. The fourth
knows the threshold, and how many scores equal to it stand before it in the same matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


DIGITS = (11, 10, 10)  # bits of each; a lane keeps 2^bits / 32 counts, 12 bits spill
ROWS = 32  # of one program: 128 programs for 4096 rows, about one for each processor of an H100
WARPS = 8
COLUMNS = 128  # the widest window
BEFORE = 1024  # programs whose ties are read at once


def select_(
    mask: Tensor,
    W: Tensor,
    diagonal: Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    *,
    rows_each: int = ROWS,
    warps: int = WARPS,
) -> None:
    """See `reference.select_`. For fp32 and up to 128 columns, on one stream; `rows_each`, `warps` are for tuning."""
    assert W.dtype == torch.float32 and W.shape[1] <= COLUMNS and sum(rows) == len(W)
    plan = _plan(tuple(rows), tuple(counts), rows_each, W.device)
    scratch = plan.clean.pop() if plan.clean else _scratch(len(rows), len(plan.programs), W.device)
    where = (W, diagonal, plan.programs, W.shape[1], *W.stride(), diagonal.stride(0))
    before, found = plan.wanted, scratch.found
    for digit, bits in enumerate(DIGITS):
        counted, following = scratch.counted[digit], scratch.counted[(digit + 1) % len(DIGITS)]
        _count[(len(plan.programs),)](
            *where,
            before,
            found[digit],
            scratch.counted[digit - 1],
            counted,
            following,
            scratch.last,
            SHIFT=sum(DIGITS[digit + 1 :]),
            BITS=bits,
            BITS_BEFORE=DIGITS[digit - 1] if digit else 0,
            BITS_FOLLOWING=DIGITS[(digit + 1) % len(DIGITS)],
            LAST=digit == len(DIGITS) - 1,
            ROWS=rows_each,
            COLUMNS=COLUMNS,
            num_warps=warps,
        )
        before = found[digit]
    _mark[(len(plan.programs),)](
        *where,
        mask,
        *mask.stride(),
        before,
        scratch.counted[-1],
        scratch.last,
        BITS=DIGITS[-1],
        ROWS=rows_each,
        COLUMNS=COLUMNS,
        BEFORE=BEFORE,
        num_warps=warps,
    )
    plan.clean.append(scratch)  # after an interruption it is not clean, and does not come back


# -------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Scratch:
    """`counted`: for each digit `[matrices, 2^bits]`, the first one zero before and after. `found`: for each digit
    `[matrices, 2]`, the bits of the threshold known before it, and how many of the scores that share them are marked.
    `last`: `[programs, 2^bits]`, each program's counts of the last digit."""

    counted: list[Tensor]
    found: Tensor
    last: Tensor


@dataclass(frozen=True)
class _Plan:
    """`programs` `[programs, 4]`: its matrix, its first row, where the matrix ends, and the first program of the matrix;
    `wanted` `[matrices, 2]`: 0 and how many weights are marked; `clean`: scratch memory that is free."""

    programs: Tensor
    wanted: Tensor
    clean: list[_Scratch] = field(default_factory=list)


@lru_cache(maxsize=8)
def _plan(rows: tuple[int, ...], counts: tuple[int, ...], rows_each: int, device: torch.device) -> _Plan:
    programs, end = [], 0
    for matrix, several in enumerate(rows):
        start, end, first = end, end + several, len(programs)
        programs += [(matrix, row, end, first) for row in range(start, end, rows_each)]
    wanted = [(0, count) for _, count in zip(rows, counts, strict=True)]
    return _Plan(*(torch.tensor(table, dtype=torch.int32, device=device) for table in (programs, wanted)))


def _scratch(matrices: int, programs: int, device: torch.device) -> _Scratch:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    counted = [zeros(matrices, 1 << bits) for bits in DIGITS]
    return _Scratch(counted, zeros(len(DIGITS), matrices, 2), zeros(programs, 1 << DIGITS[-1]))


# ------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize_on_alignment=["before", "found"])  # each launch would compile again
def _count(
    W,
    diagonal,
    programs,
    width,
    w_row,
    w_column,
    d_column,
    before,  # `found` of the digit before
    found,
    counted_before,
    counted,
    following,  # `counted` of the next digit, which nobody reads now: zeroed for the next launch that adds to it
    last,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BITS_BEFORE: tl.constexpr,  # 0 for the first digit
    BITS_FOLLOWING: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Counts the scores that share the bits before this digit by this digit."""
    program = tl.program_id(0)
    matrix = tl.load(programs + 4 * program)
    scores, inside, _, _ = _scores(W, diagonal, programs, width, w_row, w_column, d_column, ROWS, COLUMNS)
    prefix, wanted = _narrow(before, counted_before, matrix, BITS_BEFORE)
    tl.store(found + 2 * matrix, prefix)  # by all programs of the matrix, the same
    tl.store(found + 2 * matrix + 1, wanted)
    if program == tl.load(programs + 4 * program + 3):
        tl.store(following + (matrix << BITS_FOLLOWING) + tl.arange(0, 1 << BITS_FOLLOWING), 0)
    bins = tl.arange(0, 1 << BITS)
    digits = tl.where(inside & (scores >> (SHIFT + BITS) == prefix), (scores >> SHIFT) & ((1 << BITS) - 1), -1)
    digits = tl.reshape(digits, [ROWS * COLUMNS])
    counts = tl.histogram(digits, 1 << BITS, mask=digits >= 0)
    tl.atomic_add(counted + (matrix << BITS) + bins, counts, mask=counts > 0, sem="relaxed")
    if LAST:
        tl.store(last + (program.to(tl.int64) << BITS) + bins, counts)


@triton.jit(do_not_specialize_on_alignment=["before", "mask"])
def _mark(
    W,
    diagonal,
    programs,
    width,
    w_row,
    w_column,
    d_column,
    mask,
    m_row,
    m_column,
    before,
    counted,
    last,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Marks the scores below the threshold, and of those equal to it the first ones that are still wanted."""
    program = tl.program_id(0)
    matrix = tl.load(programs + 4 * program)
    scores, inside, i, c = _scores(W, diagonal, programs, width, w_row, w_column, d_column, ROWS, COLUMNS)
    threshold, wanted = _narrow(before, counted, matrix, BITS)
    for start in range(tl.load(programs + 4 * program + 3), program, BEFORE):
        others = start + tl.arange(0, BEFORE)
        ties = last + ((others.to(tl.int64) << BITS) + (threshold & ((1 << BITS) - 1)))
        wanted -= tl.sum(tl.load(ties, mask=others < program, other=0))
    equal = (inside & (scores == threshold)).to(tl.int32)
    of_row = tl.sum(equal, axis=1)
    ranks = (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(equal, axis=1) - equal
    marked = (scores < threshold) | ((equal > 0) & (ranks < wanted))
    tl.store(mask + (i[:, None] * m_row + c[None, :] * m_column), marked, mask=inside)


@triton.jit
def _scores(W, diagonal, programs, width, w_row, w_column, d_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits of |w| / U_jj, which of them exist, and their rows and columns."""
    here = programs + 4 * tl.program_id(0)
    i = tl.load(here + 1) + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (i < tl.load(here + 2))[:, None] & (c < width)[None, :]  # [ROWS, COLUMNS]
    i = i.to(tl.int64)
    w = tl.load(W + (i[:, None] * w_row + c[None, :] * w_column), mask=inside, other=0.0)
    u = tl.load(diagonal + c.to(tl.int64) * d_column, mask=c < width, other=1.0)
    return tl.abs(tl.div_rn(w, u[None, :])).to(tl.int32, bitcast=True), inside, i, c


@triton.jit
def _narrow(before, counted, matrix, BITS: tl.constexpr):
    """The bits of the threshold including this digit, and how many of the scores that share them are marked."""
    prefix, wanted = tl.load(before + 2 * matrix), tl.load(before + 2 * matrix + 1)
    if BITS > 0:
        up_to = tl.cumsum(tl.load(counted + (matrix << BITS) + tl.arange(0, 1 << BITS)), axis=0)
        below = up_to < wanted
        prefix = (prefix << BITS) | tl.sum(below.to(tl.int32))
        wanted -= tl.max(tl.where(below, up_to, 0))
    return prefix, wanted
