# SPDX-License-Identifier: Apache-2.0
"""The solver: a weight matrix and a Hessian in, a sparse weight matrix out; Wanda and magnitude beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import SparsityPattern
from .hessian import Hessian
from .kernels import reference


BLOCK = 128


@dataclass(frozen=True)
class Solution:
    """`weight` in the dtype of the input, removed weights exactly +0; `mask` True where a weight was removed.

    `relative_error` is tr(D H D^T) / tr(W H W^T), with D the change of the stored weights and H undamped.
    """

    weight: Tensor
    mask: Tensor
    zeros_asked: int
    zeros_found: int
    why: str
    relative_error: float
    damping: float
    rescue: str


@torch.no_grad()
def solve(
    W: Tensor, H: Hessian, pattern: SparsityPattern, *, method: str = "sparsegpt", damping: float = 0.01
) -> Solution:
    """Prunes one weight matrix `[rows, columns]` to `pattern`; its arguments are left as they were.

    Raises `ValueError` for weights that are not finite, before or after; for columns that m does not divide; and for a
    Hessian that is empty, not finite, or cannot be factored.
    """
    if not bool(W.isfinite().all()):
        raise ValueError("The weight holds NaN or infinity.")
    if pattern.m is not None and W.shape[1] % pattern.m:
        raise ValueError(f"{W.shape[1]} columns are not divisible by m = {pattern.m} of the pattern {pattern}.")
    matrix = H.matrix
    updated, mask, dead, used, rescue = METHODS[method](W, H, pattern, damping)
    weight = updated.masked_fill(mask, 0.0).to(W.dtype)
    weight = torch.where(weight == 0, torch.zeros_like(weight), weight).contiguous()  # no minus zero
    if not bool(weight.isfinite().all()):
        raise ValueError(f"An updated weight does not fit into {W.dtype}; load the model in a dtype of wider range.")
    found = int((weight == 0).sum())
    return Solution(
        weight=weight,
        mask=mask,
        zeros_asked=int(mask.sum()),
        zeros_found=found,
        why=_why(weight, mask, dead),
        relative_error=relative_error(W, weight, matrix),
        damping=used,
        rescue=rescue,
    )


def _why(weight: Tensor, mask: Tensor, dead: Tensor) -> str:
    """Where zeros come from that nobody asked for."""
    extra = (weight == 0) & ~mask
    in_dead = int(extra[:, dead].sum())
    other = int(extra.sum()) - in_dead
    parts = [f"{in_dead} in dead inputs"] if in_dead else []
    return ", ".join(parts + ([f"{other} were zero or rounded to zero"] if other else []))


def relative_error(W: Tensor, weight: Tensor, H: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = `weight` - `W`, both `[rows, columns]`; 0 where W H W^T is zero."""
    scale, energy = W.abs().max().to(H.dtype), H.diagonal().max()  # taken out first: tiny weights would underflow
    W = W.to(H.dtype) / scale
    D = weight.to(H.dtype) / scale - W
    change = ((D @ H) / energy * D).sum(dtype=torch.float64)
    total = ((W @ H) / energy * W).sum(dtype=torch.float64)
    return float(change / total) if float(total) > 0 else 0.0


_Answer = tuple[Tensor, Tensor, Tensor, float, str]  # weights, mask, dead inputs, damping used, rescue


def _sparsegpt(W: Tensor, H: Hessian, pattern: SparsityPattern, damping: float) -> _Answer:
    """SparseGPT (Frantar and Alistarh 2023): blocks of columns; within each window the weights with the smallest
    w^2 / U_jj^2 go, and their errors are moved into the columns to the right.

    The order is that of |w| / U_jj, which is what is compared: squares of small weights would underflow into ties.
    """
    factor = H.factor(damping)
    U = factor.U
    W = W.to(U.dtype).masked_fill(factor.dead, 0.0)
    mask = torch.zeros_like(W, dtype=torch.bool)
    columns = W.shape[1]
    width = BLOCK if pattern.m is None else BLOCK - BLOCK % pattern.m
    for start in range(0, columns, width):
        block = slice(start, min(start + width, columns))
        window, corner = W[:, block], U[block, block]
        if pattern.m is None:
            scores = (window / corner.diagonal()).abs()
            chosen = reference.smallest(scores, round(pattern.fraction * window.numel()))
            W[:, block], errors, mask[:, block] = reference.sweep(window, corner, chosen)
        else:
            W[:, block], errors, mask[:, block] = reference.sweep(window, corner, None, pattern.n or 0, pattern.m)
        W[:, block.stop :].addmm_(errors, U[block, block.stop :], alpha=-1)
    return W, mask, factor.dead, factor.damping, factor.rescue


def _wanda(W: Tensor, H: Hessian, pattern: SparsityPattern, damping: float) -> _Answer:
    """Wanda (Sun et al. 2023): |w| times the norm of its input, compared within each output row; nothing is updated."""
    diagonal = H.matrix.diagonal()
    return W, _by_score(W.abs() * diagonal.sqrt(), pattern), diagonal == 0, 0.0, ""


def _magnitude(W: Tensor, H: Hessian, pattern: SparsityPattern, damping: float) -> _Answer:
    """|w|, compared within the whole matrix (Han et al. 2015); nothing is updated."""
    nothing = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    if pattern.m is not None:
        return W, _by_score(W.abs(), pattern), nothing, 0.0, ""
    return W, reference.smallest(W.abs(), round(pattern.fraction * W.numel())), nothing, 0.0, ""


def _by_score(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    if pattern.m is not None:
        return reference.smallest_in_groups(scores, pattern.m - (pattern.n or 0), pattern.m)
    columns = scores.shape[1]
    return reference.smallest_in_groups(scores, round(pattern.fraction * columns), columns)


METHODS = {"sparsegpt": _sparsegpt, "wanda": _wanda, "magnitude": _magnitude}
