# SPDX-License-Identifier: Apache-2.0
"""Triangular factors in blocks, nearly all of it as matrix products: no host synchronisation, half the matrix is touched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .ranks import ALONE, Ranks


WIDTH = 512  # columns of a block: wide enough for fast products, narrow enough that little is computed twice


def spans(size: int, width: int = WIDTH) -> Iterator[slice]:
    """The blocks of `width` indices that cover `size`, the last one ragged."""
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def _owned(size: int, ranks: Ranks) -> Iterator[tuple[slice, int]]:
    """The blocks that cover `size`, each with the rank that works on it: 0, 1, 2, 2, 1, 0, 0, 1 ... of three, since each block
    is more work than the one before, or each is less."""
    for i, block in enumerate(spans(size)):
        turn, place = divmod(i, ranks.size)
        yield block, ranks.size - 1 - place if turn % 2 else place


def _mine(size: int, ranks: Ranks) -> Iterator[slice]:
    return (block for block, owner in _owned(size, ranks) if owner == ranks.rank)


def factor_(H: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Overwrites the upper triangle of H `[n, n]` by the upper triangular F with H = F F^T; n^3 / 3 operations.

    It is the Cholesky factorisation that runs from the last column to the first. Only the upper triangle of H is read;
    below the diagonal anything may stand afterwards. Of several `ranks`, which have the same H, each works on blocks of
    columns of its own, and sends each to the others as soon as it is final: n^2 / 2 numbers in all.

    Returns:
        A flag on the device of H: True where a pivot in a block of this rank was not positive. F is then of no use.
    """
    failed = torch.zeros((), dtype=torch.bool, device=H.device)
    for block, owner in reversed(list(_owned(len(H), ranks))):
        panel = H[: block.start, block]
        if owner == ranks.rank:
            L, info = torch.linalg.cholesky_ex(H[block, block].flip(0, 1))
            failed |= info != 0
            F = L.flip(0, 1)
            H[block, block] = F
            if block.start:
                panel.copy_(torch.linalg.solve_triangular(F.t(), panel, upper=False, left=False))
        ranks.send(H[: block.stop, block], source=owner)
        for span in _mine(block.start, ranks):
            H[: span.stop, span].addmm_(panel[: span.stop], panel[span].t(), alpha=-1)
    return failed


def invert_(F: Tensor, ranks: Ranks = ALONE) -> None:
    """Overwrites the upper triangular F `[n, n]` by its inverse; n^3 / 3 operations. Below the diagonal 0 is written.

    A row of the inverse follows from F and from itself: of several `ranks`, which have the same F, each works on blocks of
    rows of its own, and sends them in the end; n^2 / 2 numbers in all.
    """
    F.triu_()
    for block in spans(len(F)):
        panel, corner = F[: block.start, block], F[block, block]
        identity = torch.eye(len(corner), dtype=F.dtype, device=F.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=True))
        above = (panel @ corner).neg_() if ranks.size == 1 else None  # of no use to those who have few of the rows
        for span in _mine(block.start, ranks):
            left = F[span, span.start : block.start]  # is inverted already
            if above is not None:
                torch.mm(left, above[span.start :], out=F[span, block])
            else:
                torch.mm(left @ panel[span.start :], corner, out=F[span, block]).neg_()
    for block, owner in _owned(len(F), ranks):
        ranks.send(F[block, block.start :], source=owner)


def quadratic_form(D: Tensor, H: Tensor) -> Tensor:
    """tr(D^T H D) for D `[n, k]`, in float64, from the upper triangle of H; k n^2 operations."""
    total = torch.zeros((), dtype=torch.float64, device=D.device)
    for block in spans(len(H), 2 * WIDTH):  # one product each: wider than where a factor is made
        corner = H[block, block].triu()
        product = (corner + corner.triu(1)) @ D[block]
        product.addmm_(H[block, block.stop :], D[block.stop :], alpha=2)
        total += product.mul_(D[block]).sum(dim=1).sum(dtype=torch.float64)
    return total
