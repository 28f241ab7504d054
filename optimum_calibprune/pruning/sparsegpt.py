# SPDX-License-Identifier: Apache-2.0
"""The solver: weight matrices and the Hessian of their input in, sparse matrices out; Wanda and magnitude beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import SparsityPattern
from .hessian import Hessian, NotFactored
from .kernels import Kernels, reference
from .kernels.precision import full_precision
from .triangular import quadratic_form, spans


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


def solve(
    W: Tensor, H: Hessian, pattern: SparsityPattern, *, method: str = "sparsegpt", damping: float = 0.01
) -> Solution:
    """Prunes one weight matrix `[rows, columns]` to `pattern`; see `solve_together`."""
    return solve_together([W], H, pattern, method=method, damping=damping)[0]


@torch.no_grad()
def solve_together(
    weights: Sequence[Tensor],
    H: Hessian,
    patterns: SparsityPattern | Sequence[SparsityPattern],
    *,
    method: str = "sparsegpt",
    damping: float = 0.01,
    names: Sequence[str] | None = None,
) -> list[Solution]:
    """Prunes the weight matrices `[rows, columns]` that read the same input, each to its pattern, or all to one; what was
    given is left as it was. Those without n:m are solved in one sweep, and so are those of one n:m; all share the factor.
    For each of these sweeps the host waits for the device twice: for the factor, and for the numbers of the solutions.

    Raises `ValueError`, with the names of the matrices where they are given, for weights that are not finite, before or
    after; for columns that m does not divide; and for a Hessian that is empty, not finite (`NotFinite`), or cannot be
    factored.
    """
    several = [patterns] * len(weights) if isinstance(patterns, SparsityPattern) else list(patterns)
    names = names or [""] * len(weights)
    solutions: dict[int, Solution] = {}
    for alike in _alike(several):
        of_these = ([of_all[i] for i in alike] for of_all in (weights, several, names))
        solutions |= zip(alike, _solve_alike(*of_these, H, method, damping), strict=True)
    return [solutions[i] for i in range(len(weights))]


def _alike(patterns: Sequence[SparsityPattern]) -> list[list[int]]:
    """Which of the patterns can be had in one sweep: all that are unstructured, and all of the same n:m."""
    found: dict[tuple[int | None, int | None], list[int]] = {}
    for i, pattern in enumerate(patterns):
        found.setdefault((pattern.n, pattern.m), []).append(i)
    return list(found.values())


def _solve_alike(
    weights: Sequence[Tensor],
    patterns: Sequence[SparsityPattern],
    names: Sequence[str],
    H: Hessian,
    method: str,
    damping: float,
) -> list[Solution]:
    columns, pattern = weights[0].shape[1], patterns[0]
    together = f"{', '.join(names)}: " if names[0] else ""
    if pattern.m is not None and columns % pattern.m:
        raise ValueError(f"{together}{columns} columns are not divisible by m = {pattern.m} of the pattern {pattern}.")
    dense = [
        W.t().contiguous() for W in weights
    ]  # [columns, rows], as everything below: a column is one run of memory
    with full_precision():
        try:
            answer = METHODS[method](dense, H, patterns, damping)
        except NotFactored as error:
            raise ValueError(f"{together}{error}") from error
        sparse = [new.to(W.dtype).add_(0.0) for new, W in zip(answer.weights, dense, strict=True)]  # no minus zero
        tensors = zip(dense, sparse, answer.masks, strict=True)
        numbers = torch.stack([_numbers(*of_one, answer.dead, H) for of_one in tensors]).tolist()
    parts = zip(names, sparse, answer.masks, numbers, strict=True)
    return [_solution(name, weight, mask, of_one, answer) for name, weight, mask, of_one in parts]


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class _Answer:
    """New weights and masks `[columns, rows]` of each matrix; which inputs are dead (None: none that matters)."""

    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    dead: Tensor | None = None
    damping: float = 0.0
    rescue: str = ""


def _sparsegpt(weights: Sequence[Tensor], H: Hessian, patterns: Sequence[SparsityPattern], damping: float) -> _Answer:
    """SparseGPT (Frantar and Alistarh 2023): windows of columns; within each, the weights of every matrix with the
    smallest w^2 / U_jj^2 go, and their errors are moved into the columns to the right.

    The order is that of |w| / U_jj, which is what is compared: squares of small weights would underflow into ties.
    """
    factor = H.factor(damping)
    U, rows = factor.U, [weight.shape[1] for weight in weights]
    W = torch.cat(list(weights), dim=1).to(U.dtype)  # the rows of all of them side by side
    if factor.dead is not None:
        W.masked_fill_(factor.dead[:, None], 0.0)
    mask = torch.empty_like(W, dtype=torch.bool)
    all_errors = W.new_empty(min(BLOCK, len(W)), W.shape[1])
    for window in spans(len(W), BLOCK - BLOCK % (patterns[0].m or 1)):
        errors = all_errors[: window.stop - window.start]
        _remove(H.kernels, W[window], errors, mask[window], U[window, window], patterns, rows)
        W[window.stop :].addmm_(U[window, window.stop :].t(), errors, alpha=-1)
    parts = W.split(rows, dim=1), mask.split(rows, dim=1)
    return _Answer(*parts, factor.dead, factor.damping, factor.rescue)


def _remove(
    kernels: Kernels,
    W: Tensor,
    errors: Tensor,
    mask: Tensor,
    U: Tensor,
    patterns: Sequence[SparsityPattern],
    rows: Sequence[int],
) -> None:
    """One window, `[width, rows]`: chooses, removes, and moves the errors inside it."""
    if patterns[0].m is not None:
        kernels.sweep_(W.t(), errors.t(), mask.t(), U, patterns[0].n or 0, patterns[0].m)
        return
    counts = [round(pattern.fraction * several * len(W)) for pattern, several in zip(patterns, rows, strict=True)]
    kernels.select_(mask.t(), W.t(), U.diagonal(), rows, counts)
    kernels.sweep_(W.t(), errors.t(), mask.t(), U)


def _wanda(weights: Sequence[Tensor], H: Hessian, patterns: Sequence[SparsityPattern], damping: float) -> _Answer:
    """Wanda (Sun et al. 2023): |w| times the norm of its input, compared within each output row; nothing is updated."""
    norms = H.diagonal.sqrt()
    masks = [_by_score(W.t().abs() * norms, pattern).t() for W, pattern in zip(weights, patterns, strict=True)]
    return _Answer(_masked(weights, masks), masks, norms == 0)


def _magnitude(weights: Sequence[Tensor], H: Hessian, patterns: Sequence[SparsityPattern], damping: float) -> _Answer:
    """|w|, compared within the whole matrix (Han et al. 2015); nothing is updated."""
    H.check()
    masks = []
    for W, pattern in zip(weights, patterns, strict=True):
        scores = W.t().abs()
        if pattern.m is not None:
            masks.append(_by_score(scores, pattern).t())
        else:
            masks.append(reference.smallest(scores, round(pattern.fraction * W.numel())).t())
    return _Answer(_masked(weights, masks), masks)


def _by_score(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    if pattern.m is not None:
        return reference.smallest_in_groups(scores, pattern.m - (pattern.n or 0), pattern.m)
    columns = scores.shape[1]
    return reference.smallest_in_groups(scores, round(pattern.fraction * columns), columns)


def _masked(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    return [W.masked_fill(mask, 0.0) for W, mask in zip(weights, masks, strict=True)]


METHODS = {"sparsegpt": _sparsegpt, "wanda": _wanda, "magnitude": _magnitude}


# -------------------------------------------------------------------------------------------- solutions


def _numbers(W: Tensor, weight: Tensor, mask: Tensor, dead: Tensor | None, H: Hessian) -> Tensor:
    """What the host wants to know of one matrix, in the order in which `_solution` reads it, in float64 on the device."""
    zero = weight == 0
    extra = zero & ~mask
    counted = (mask, zero, extra, extra[:0] if dead is None else extra & dead[:, None])
    ends = torch.stack([end.double() for tensor in (W, weight) for end in tensor.aminmax()])  # NaN where there is one
    finite = ends.isfinite().view(2, 2).all(dim=1)
    counts = [which.count_nonzero() for which in counted]
    return torch.stack([number.double() for number in (*finite, *counts, *_energies(W, weight, H))])


def _solution(name: str, weight: Tensor, mask: Tensor, numbers: Sequence[float], answer: _Answer) -> Solution:
    dense_finite, finite, asked, found, extra, in_dead, change, energy = numbers
    if not dense_finite:
        raise ValueError(f"{name or 'The weight'} holds NaN or infinity.")
    if not finite:
        raise ValueError(
            f"An updated weight of {name or 'the matrix'} does not fit into {weight.dtype}; load the model in a dtype of "
            "wider range."
        )
    why = [f"{in_dead:.0f} in dead inputs"] if in_dead else []
    why += [f"{extra - in_dead:.0f} were zero or rounded to zero"] if extra > in_dead else []
    return Solution(
        weight=weight.t().contiguous(),
        mask=mask.t(),
        zeros_asked=int(asked),
        zeros_found=int(found),
        why=", ".join(why),
        relative_error=change / energy if energy > 0 else 0.0,
        damping=answer.damping,
        rescue=answer.rescue,
    )


def relative_error(W: Tensor, weight: Tensor, H: Hessian) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = `weight` - `W`, both `[rows, columns]`; 0 where W H W^T is zero."""
    with full_precision():
        change, energy = torch.stack(_energies(W.t(), weight.t(), H)).tolist()
    return change / energy if energy > 0 else 0.0


def _energies(W: Tensor, weight: Tensor, H: Hessian) -> tuple[Tensor, Tensor]:
    """tr(D^T H D) and tr(W^T H W) for `[columns, rows]`, in units in which neither the weights nor H are tiny or huge."""
    lowest, highest = (end.to(H.sum.dtype) for end in W.aminmax())
    scale = torch.maximum(highest, -lowest) * H.sum.diagonal().max().sqrt()
    dense = W.to(H.sum.dtype, copy=True)
    change = weight.to(H.sum.dtype, copy=True).sub_(dense).div_(scale)
    return quadratic_form(change, H.sum), quadratic_form(dense.div_(scale), H.sum)
