# SPDX-License-Identifier: Apache-2.0
"""Plain-torch definitions of the solver's kernels; a faster twin has the same signature and must match them."""

from __future__ import annotations

import torch
from torch import Tensor


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


def smallest_in_groups(scores: Tensor, count: int, size: int) -> Tensor:
    """Mask of the `count` smallest scores in every `size` neighbouring columns of each row, ties by position."""
    groups = scores.unflatten(1, (-1, size))
    order = groups.argsort(dim=2, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :count], True).flatten(1)


def sweep(W: Tensor, U: Tensor, mask: Tensor | None, n: int = 0, m: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Removes weights column by column and moves each one's error into the columns to its right, within one block.

    SparseGPT (Frantar and Alistarh 2023, algorithm 1): for a removed weight w_j the error is e_j = w_j / U_jj, and
    every later column k of its row becomes w_k - e_j U_jk.

    Args:
        W: `[rows, width]`, the block's weights as the blocks to its left have updated them.
        U: `[width, width]`, the block on the diagonal of the upper Cholesky factor of the inverse Hessian.
        mask: `[rows, width]`, True where a weight is removed; None chooses by n:m as the sweep arrives.
        n, m: at every m-th column, all but n of the next m weights of a row are removed, by smallest |w| / U_jj.

    Returns:
        new weights `[rows, width]`, errors `[rows, width]`, and the mask.
    """
    width = W.shape[1]
    columns = W.t().clone(memory_format=torch.contiguous_format)  # [width, rows]: each column is one run of memory
    errors = torch.zeros_like(columns)
    chosen = torch.zeros_like(W, dtype=torch.bool) if mask is None else mask
    removed = chosen.t().contiguous()
    for j in range(width):
        if mask is None and j % m == 0:
            scores = (columns[j : j + m] / U.diagonal()[j : j + m, None]).abs().t()
            removed[j : j + m] = smallest_in_groups(scores, m - n, m).t()
        errors[j] = torch.where(removed[j], columns[j] / U[j, j], 0.0)
        columns[j].masked_fill_(removed[j], 0.0)
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return columns.t(), errors.t(), removed.t()
