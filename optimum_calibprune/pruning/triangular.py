# SPDX-License-Identifier: Apache-2.0
"""Triangular factors in blocks, nearly all of it as matrix products: no host synchronisation, half the matrix is touched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


WIDTH = 512  # columns of a block: wide enough for fast products, narrow enough that little is computed twice


def spans(size: int, width: int = WIDTH) -> Iterator[slice]:
    """The blocks of `width` indices that cover `size`, the last one ragged."""
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def factor_(H: Tensor) -> Tensor:
    """Overwrites the upper triangle of H `[n, n]` by the upper triangular F with H = F F^T; n^3 / 3 operations.

    It is the Cholesky factorisation that runs from the last column to the first. Only the upper triangle of H is read;
    below the diagonal anything may stand afterwards.

    Returns:
        A flag on the device of H: True where a pivot was not positive. F is then of no use.
    """
    failed = torch.zeros((), dtype=torch.bool, device=H.device)
    for block in reversed(list(spans(len(H)))):
        L, info = torch.linalg.cholesky_ex(H[block, block].flip(0, 1))
        failed |= info != 0
        F = L.flip(0, 1)
        H[block, block] = F
        if block.start == 0:
            break
        panel = H[: block.start, block]
        panel.copy_(torch.linalg.solve_triangular(F.t(), panel, upper=False, left=False))
        for span in spans(block.start):
            H[: span.stop, span].addmm_(panel[: span.stop], panel[span].t(), alpha=-1)
    return failed


def invert_(F: Tensor) -> None:
    """Overwrites the upper triangular F `[n, n]` by its inverse; n^3 / 3 operations. Below the diagonal 0 is written."""
    F.triu_()
    for block in spans(len(F)):
        corner = F[block, block]
        identity = torch.eye(len(corner), dtype=F.dtype, device=F.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=True))
        above = (F[: block.start, block] @ corner).neg_()
        for span in spans(block.start):  # the part left of `block` is inverted already
            torch.mm(F[span, span.start : block.start], above[span.start :], out=F[span, block])


def quadratic_form(D: Tensor, H: Tensor) -> Tensor:
    """tr(D^T H D) for D `[n, k]`, in float64, from the upper triangle of H; k n^2 operations."""
    total = torch.zeros((), dtype=torch.float64, device=D.device)
    for block in spans(len(H), 2 * WIDTH):  # one product each: wider than where a factor is made
        corner = H[block, block].triu()
        product = (corner + corner.triu(1)) @ D[block]
        product.addmm_(H[block, block.stop :], D[block.stop :], alpha=2)
        total += product.mul_(D[block]).sum(dim=1).sum(dtype=torch.float64)
    return total
