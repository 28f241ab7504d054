# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202
"""`reference.sweep_` in Triton, in one launch: a program sweeps its rows through the whole window.

It takes the window in steps of a few columns. What the errors to the left of a step change in it is added first, error
by error; then the step's columns are swept one by one in registers. Rows are the dimension that is contiguous in the
solver's memory: one lane holds one row of a step (fewer columns of it where a step is wide), so that reading and writing
coalesce and no step of the sweep waits for another lane.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


STEP = 16  # columns: unrolled they compile in a second or two; the whole window took more than eight minutes
HELD = 16  # weights that a lane holds: 32 rows x 16 columns, 4 x 128; with twice as many, n:m spills registers
WARPS = 1  # no barrier between the warps of a program, and a program for each 32 rows: small matrices fill a GPU, too
LANES = 32  # of a warp


def sweep_(
    W: Tensor,
    errors: Tensor,
    mask: Tensor,
    U: Tensor,
    n: int = 0,
    m: int = 0,
    *,
    step: int = STEP,
    held: int = HELD,
    warps: int = WARPS,
) -> None:
    """See `reference.sweep_`. For fp32 and float64; `step`, `held` and `warps` are for tuning."""
    rows, width = W.shape
    step = m * max(1, step // m) if m else step
    tile = triton.next_power_of_2(step)
    rows_each = max(1, held * LANES * warps // tile)
    _sweep[(triton.cdiv(rows, rows_each),)](
        W,
        errors,
        mask,
        U,
        rows,
        width,
        *W.stride(),
        *errors.stride(),
        *mask.stride(),
        *U.stride(),
        N=n,
        M=m,
        ROWS=rows_each,
        STEP=step,
        TILE=tile,
        UNROLL=step if step <= STEP else 1,
        num_warps=warps,
    )


# Their alignment must not be used: vectors of several rows would take the place of one row a lane.
@triton.jit(do_not_specialize_on_alignment=["W", "errors", "mask"])
def _sweep(
    W,
    errors,
    mask,
    U,
    rows,
    width,
    w_row,
    w_column,
    e_row,
    e_column,
    m_row,
    m_column,
    u_row,
    u_column,
    N: tl.constexpr,
    M: tl.constexpr,  # 0: the mask is given
    ROWS: tl.constexpr,
    STEP: tl.constexpr,  # columns, a multiple of M
    TILE: tl.constexpr,  # STEP rounded up to a power of two
    UNROLL: tl.constexpr,
):
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
    c = tl.arange(0, TILE)
    for start in range(0, width, STEP):
        columns = start + c  # [TILE]
        real = columns < width
        if STEP < TILE:
            real = real & (c < STEP)
        inside = (i < rows)[:, None] & real[None, :]  # [ROWS, TILE], and so is all that is two-dimensional below
        w = tl.load(_tile(W, i, columns, w_row, w_column), mask=inside, other=0.0)

        for left in range(0, start, STEP):
            for k in tl.range(0, STEP, loop_unroll_factor=UNROLL):
                e = tl.load(errors + i * e_row + (left + k) * e_column, mask=i < rows, other=0.0)
                u = tl.load(U + (left + k) * u_row + columns * u_column, mask=real, other=0.0)
                w -= e[:, None] * u[None, :]

        diagonal = tl.load(U + columns * (u_row + u_column), mask=real, other=1.0)
        if M == 0:
            removed = tl.load(_tile(mask, i, columns, m_row, m_column), mask=inside, other=False)
        else:
            removed = tl.zeros([ROWS, TILE], tl.int1)
        for k in tl.range(0, STEP, loop_unroll_factor=UNROLL):
            if M != 0:  # noqa: SIM102
                if k % M == 0:  # not `and`, which would divide by M = 0
                    scores = _bits(_divide(w, diagonal[None, :]))
                    group = (c >= k) & (c < k + M)
                    removed = removed | ((_ranks(scores, c, k, M) < M - N) & group[None, :])
            j = tl.minimum(start + k, width - 1)  # beyond the window nothing is removed
            pivot = tl.load(U + j * (u_row + u_column))
            column = tl.sum(tl.where(removed & (c == k)[None, :], _bits(w), 0), axis=1)  # 0 where the weight is kept
            e = _divide(column.to(w.dtype, bitcast=True), pivot)
            u = tl.load(U + j * u_row + columns * u_column, mask=real, other=0.0)
            w = tl.where((c > k)[None, :], w - e[:, None] * u[None, :], w)

        if M != 0:
            tl.store(_tile(mask, i, columns, m_row, m_column), removed, mask=inside)
        e = tl.where(removed, _divide(w, diagonal[None, :]), 0.0)  # the same once more
        tl.store(_tile(errors, i, columns, e_row, e_column), e, mask=inside)
        tl.store(_tile(W, i, columns, w_row, w_column), tl.where(removed, 0.0, w), mask=inside)
        tl.debug_barrier()  # the next steps read these errors


@triton.jit
def _tile(tensor, i, columns, row, column):
    return tensor + (i[:, None] * row + columns[None, :] * column)


@triton.jit
def _ranks(bits, c, first, M: tl.constexpr):
    """The place of every |score| in the order of columns `first` to `first` + M, ties by position."""
    sign: tl.constexpr = -1 << (bits.dtype.primitive_bitwidth - 1)
    bits = bits & ~sign  # non-negative numbers are ordered as their bits
    ranks = tl.zeros_like(bits)
    for k in tl.range(first, first + M):
        one = tl.sum(tl.where((c == k)[None, :], bits, 0), axis=1)[:, None]
        ranks += (one < bits + (c > k)[None, :].to(bits.dtype)).to(bits.dtype)  # <= to the right of it
    return ranks


@triton.jit
def _bits(w):
    """As integers: a sum of one number and zeros is that number, without additions if the zeros are known."""
    return w.to(tl.int64 if w.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def _divide(w, u):
    """Rounded to nearest: the approximate division of fp32 compounds over columns."""
    if w.dtype == tl.float64:
        return w / u
    else:
        return tl.div_rn(w, u)
