# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202
"""`reference.add_gram_` in Triton, in one launch: 16-bit inputs, products and sums in fp32, half of the tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocked


ROWS, COLUMNS = 128, 128  # of a tile of the total
TOKENS = 64  # that are multiplied at once
STAGES = 3  # with 96 KB of shared memory and 128 registers a lane, an H100 runs two programs at a time
WARPS = 8
GROUP = 8  # rows of tiles whose programs run side by side, and find each other's inputs in the cache


def add_gram_(
    total: Tensor,
    x: Tensor,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
    tokens: int = TOKENS,
    stages: int = STAGES,
    warps: int = WARPS,
    group: int = GROUP,
) -> None:
    """See `reference.add_gram_`. For 16-bit inputs and an fp32 total, else `blocked` does it; the rest is for tuning."""
    if x.dtype not in (torch.bfloat16, torch.float16) or total.dtype != torch.float32:
        blocked.add_gram_(total, x)
        return
    size = len(total)
    _add_gram[(triton.cdiv(size, rows) * triton.cdiv(size, columns),)](
        total,
        x,
        len(x),
        size,
        *total.stride(),
        *x.stride(),
        ROWS=rows,
        COLUMNS=columns,
        TOKENS=tokens,
        GROUP=group,
        num_stages=stages,
        num_warps=warps,
    )


@triton.jit
def _add_gram(
    total,
    x,
    tokens,
    size,
    t_row,
    t_column,
    x_token,
    x_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = tl.cdiv(size, ROWS), tl.cdiv(size, COLUMNS)
    program = tl.program_id(0)
    i, j = tl.swizzle2d(program // across, program % across, down, across, GROUP)
    i, j = i * ROWS, j * COLUMNS
    if j + COLUMNS <= i:  # below the diagonal
        return
    rows, columns, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
    step = TOKENS * tl.cast(x_token, tl.int64)  # a stride of 1 is a constant
    left = x + i.to(tl.int64) * x_column
    right = x + j.to(tl.int64) * x_column
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tokens, TOKENS):
        real = start + k < tokens
        a = tl.load(  # [ROWS, TOKENS]
            left + (rows.to(tl.int64)[:, None] * x_column + k[None, :] * x_token),
            mask=(i + rows < size)[:, None] & real[None, :],
            other=0.0,
        )
        b = tl.load(  # [TOKENS, COLUMNS]
            right + (k[:, None] * x_token + columns.to(tl.int64)[None, :] * x_column),
            mask=real[:, None] & (j + columns < size)[None, :],
            other=0.0,
        )
        sums = tl.dot(a, b, sums)
        left += step
        right += step
    # Half by half: the old and the new sums of a whole tile do not fit into 128 registers.
    half: tl.constexpr = COLUMNS // 2
    first, second = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, half]), [0, 2, 1]))
    _add(total, first, i, j, size, t_row, t_column)
    _add(total, second, i, j + half, size, t_row, t_column)


@triton.jit
def _add(total, sums, i, j, size, t_row, t_column):
    rows, columns = i + tl.arange(0, sums.shape[0]), j + tl.arange(0, sums.shape[1])
    tile = total + (rows.to(tl.int64)[:, None] * t_row + columns.to(tl.int64)[None, :] * t_column)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    tl.store(tile, tl.load(tile, mask=inside, other=0.0) + sums, mask=inside)
