# SPDX-License-Identifier: Apache-2.0
"""Plain-torch definitions of the solver's kernels. Their faster twins have the same signatures and must match them.

All work on one window of neighbouring columns, in place, and take tensors of any strides: the solver keeps its weights
column by column in memory, as `[columns, rows]`, and passes the transposed view `[rows, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_(mask: Tensor, W: Tensor, diagonal: Tensor, rows: Sequence[int], counts: Sequence[int]) -> None:
    """Marks in `mask` the weights of a window that go: the smallest |w_ij| / U_jj, exactly so many of each matrix.

    Args:
        mask: `[rows, width]` bool, overwritten.
        W: `[rows, width]`, the rows of several matrices one below the other.
        diagonal: `[width]`, the U_jj > 0.
        rows: how many rows each matrix has; counts: how many of its weights are marked. Ties go by position, row after row.
    """
    scores = (W / diagonal).abs()
    parts = zip(scores.split(list(rows)), counts, strict=True)
    mask.copy_(torch.cat([smallest(part, count) for part, count in parts]))


def sweep_(W: Tensor, errors: Tensor, mask: Tensor, U: Tensor, n: int = 0, m: int = 0) -> None:
    """Removes weights column by column and moves each one's error into the columns to its right, within one window.

    SparseGPT (Frantar and Alistarh 2023, algorithm 1): for a removed weight w_j the error is e_j = w_j / U_jj, and
    every later column k of its row becomes w_k - e_j U_jk.

    Args:
        W: `[rows, width]`, the window's weights as the windows to its left have updated them; overwritten by the new ones.
        errors: `[rows, width]`, overwritten by the e_j, 0 where a weight is kept.
        mask: `[rows, width]` bool, True where a weight is removed; with n:m it is not read but written.
        U: `[width, width]`, the window's part on the diagonal of the upper Cholesky factor of the inverse Hessian; what
            is below its diagonal is not read.
        n, m: at every m-th column, all but n of the next m weights of a row are removed, by smallest |w| / U_jj, ties
            by position; m divides width.
    """
    width = W.shape[1]
    for j in range(width):
        if m and j % m == 0:
            scores = (W[:, j : j + m] / U.diagonal()[j : j + m]).abs()
            mask[:, j : j + m] = smallest_in_groups(scores, m - n, m)
        errors[:, j] = torch.where(mask[:, j], W[:, j] / U[j, j], 0.0)
        W[:, j] = torch.where(mask[:, j], 0.0, W[:, j])
        W[:, j + 1 :].addr_(errors[:, j], U[j, j + 1 :], alpha=-1)


def add_gram_(total: Tensor, x: Tensor) -> None:
    """Adds X^T X to the upper triangle of `total`; what is below the diagonal may be anything afterwards.

    Args:
        total: `[columns, columns]`, fp32 or float64: products are exact or of its precision, sums of its precision.
        x: `[tokens, columns]`, of any floating-point type.
    """
    x = x.to(total.dtype)
    total.add_((x.t() @ x).triu())


# ----------------------------------------------------------------------------------------------- choices


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask `[rows, columns]` of exactly `count` smallest scores of the whole window, ties by position, row after row."""
    flat = scores.flatten()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def smallest_in_rows(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask `[rows, columns]` of so many of the smallest scores of each row, ties by position."""
    order = scores.argsort(dim=1, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < torch.tensor(counts, device=scores.device)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen)


def smallest_in_groups(scores: Tensor, count: int, size: int) -> Tensor:
    """Mask of the `count` smallest scores in every `size` neighbouring columns of each row, ties by position."""
    groups = scores.unflatten(1, (-1, size))
    order = groups.argsort(dim=2, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :count], True).flatten(1)
