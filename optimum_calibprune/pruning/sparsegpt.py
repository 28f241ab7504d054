# SPDX-License-Identifier: Apache-2.0
"""The solver: weight matrices and the Hessian of their input in, sparse matrices out; Wanda and magnitude beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..records import SparsityPattern
from .hessian import Hessian, NotFactored
from .kernels import Kernels, reference
from .kernels.precision import full_precision
from .ranks import ALONE, Ranks
from .triangular import quadratic_form, spans


BLOCK = 128
PANEL = 4  # windows
Target = SparsityPattern | int  # what a matrix is pruned to: a pattern, or a number of zeros, spread over it evenly


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
    W: Tensor,
    H: Hessian,
    target: Target,
    *,
    method: str = "sparsegpt",
    damping: float = 0.01,
    ranks: Ranks = ALONE,
) -> Solution:
    """Prunes one weight matrix `[rows, columns]` to its target; see `solve_together`."""
    return solve_together([W], H, target, method=method, damping=damping, ranks=ranks)[0]


@torch.no_grad()
def solve_together(
    weights: Sequence[Tensor],
    H: Hessian,
    targets: Target | Sequence[Target],
    *,
    method: str = "sparsegpt",
    damping: float = 0.01,
    names: Sequence[str] | None = None,
    ranks: Ranks = ALONE,
) -> list[Solution]:
    """Prunes the weight matrices `[rows, columns]` that read the same input, each to its target, or all to one; what was
    given is left as it was. Those without n:m are solved in one sweep, and so are those of one n:m. For each of these sweeps
    the host waits for the device twice: for the factor, and for the numbers of the solutions. Where several `ranks` are given
    the same, each solves a part of the rows, and all have the solutions.

    Raises `ValueError`, with the names of the matrices where they are given, for weights that are not finite, before or
    after; for columns that m does not divide; and for a Hessian that is empty, not finite (`NotFinite`), or cannot be
    factored.
    """
    several = [targets] * len(weights) if isinstance(targets, SparsityPattern | int) else list(targets)
    names = names or [""] * len(weights)
    solutions: dict[int, Solution] = {}
    for alike in _alike(several):
        of_these = ([of_all[i] for i in alike] for of_all in (weights, several, names))
        solutions |= zip(alike, _solve_alike(*of_these, H, method, damping, ranks), strict=True)
    return [solutions[i] for i in range(len(weights))]


def _alike(targets: Sequence[Target]) -> list[list[int]]:
    """Which of the targets can be had in one sweep: all that are unstructured, and all of the same n:m."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, target in enumerate(targets):
        found.setdefault(_n_of_m(target), []).append(i)
    return list(found.values())


def _n_of_m(target: Target) -> tuple[int, int]:
    """n and m; zeros where it is unstructured."""
    return (target.n or 0, target.m or 0) if isinstance(target, SparsityPattern) else (0, 0)


def _solve_alike(
    weights: Sequence[Tensor],
    targets: Sequence[Target],
    names: Sequence[str],
    H: Hessian,
    method: str,
    damping: float,
    ranks: Ranks,
) -> list[Solution]:
    columns, (_, m) = weights[0].shape[1], _n_of_m(targets[0])
    together = f"{', '.join(names)}: " if names[0] else ""
    if m and columns % m:
        raise ValueError(f"{together}{columns} columns are not divisible by m = {m} of the pattern {targets[0]}.")
    with full_precision():
        try:
            answer = METHODS[method](weights, H, targets, damping, ranks)
        except NotFactored as error:
            raise ValueError(f"{together}{error}") from error
        own = _Rows.of([len(weight) for weight in weights], ranks).of_each
        tensors = zip(own, weights, answer.weights, answer.masks, strict=True)
        numbers = torch.stack([_numbers(*of_one, answer.dead, H) for of_one in tensors])
        ranks.add_up(numbers[:, FINITE:])
    parts = zip(names, answer.weights, answer.masks, numbers.tolist(), strict=True)
    return [_solution(name, weight, mask, of_one, answer) for name, weight, mask, of_one in parts]


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class _Answer:
    """New weights, as they will be stored, and masks `[rows, columns]` of each matrix; which inputs are dead (None: none
    that matters)."""

    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    dead: Tensor | None = None
    damping: float = 0.0
    rescue: str = ""


@dataclass(frozen=True)
class _Rows:
    """Which of the rows of several matrices, one below the other, are solved by this rank: `start` to `stop`, with rows of
    zeros up to `height`, which is the same on all ranks; and `of_each` matrix, which rows of it these are."""

    total: int
    height: int
    start: int
    stop: int
    of_each: tuple[slice, ...]

    @classmethod
    def of(cls, rows: Sequence[int], ranks: Ranks) -> _Rows:
        total = sum(rows)
        height = -(-total // ranks.size)
        start, stop = (min(total, height * rank) for rank in (ranks.rank, ranks.rank + 1))
        ends = list(accumulate(rows))
        inside = [(max(start, end - n) - end + n, min(stop, end) - end + n) for n, end in zip(rows, ends, strict=True)]
        return cls(total, height, start, stop, tuple(slice(a, max(a, b)) for a, b in inside))


def zeros_in_parts(target: Target, method: str, rows: int, columns: int) -> list[int]:
    """How many weights a method removes, without n:m, from each part of a matrix `[rows, columns]`: SparseGPT's parts are
    windows of columns, Wanda's are rows, and to magnitude pruning the matrix is one.

    A number of zeros is spread evenly: each part loses its share of them rounded down, and the first ones lose one more,
    until the number is reached.
    """
    if method == "sparsegpt":
        parts = [(rows, window.stop - window.start) for window in spans(columns, BLOCK)]
    else:
        parts = [(1, columns)] * rows if method == "wanda" else [(rows, columns)]
    if isinstance(target, SparsityPattern):
        return [round(target.fraction * height * width) for height, width in parts]
    shares = [target * height * width // (rows * columns) for height, width in parts]
    left = target - sum(shares)
    return [share + (i < left) for i, share in enumerate(shares)]


def _sparsegpt(
    weights: Sequence[Tensor], H: Hessian, targets: Sequence[Target], damping: float, ranks: Ranks
) -> _Answer:
    """SparseGPT (Frantar and Alistarh 2023): windows of columns; within each, the weights of every matrix with the
    smallest w^2 / U_jj^2 go, and their errors are moved into the columns to the right.

    The order is that of |w| / U_jj, which is what is compared: squares of small weights would underflow into ties.

    Several ranks factor together, and each sweeps its part of all rows; what goes in a window is chosen among all of them.
    """
    factor = H.factor(damping, ranks)
    rows = [len(weight) for weight in weights]
    W = _columns_of(weights, factor.U.dtype, _Rows.of(rows, ranks))
    if factor.dead is not None:
        W.masked_fill_(factor.dead[:, None], 0.0)
    mask = sweep_windows_(W, factor.U, targets, rows, H.kernels, ranks)
    how = factor.dead, factor.damping, factor.rescue
    del factor  # its square makes room for the new weights
    if ranks.size > 1:
        W = ranks.gather(_stored(W, weights[0].dtype))[: sum(rows)].t()
        mask = ranks.gather(mask.to(torch.uint8), dim=1)[:, : sum(rows)].bool()
    new = [_stored(part, weight.dtype) for part, weight in zip(W.split(rows, dim=1), weights, strict=True)]
    return _Answer(new, [part.t() for part in mask.split(rows, dim=1)], *how)


def sweep_windows_(
    W: Tensor,
    U: Tensor,
    targets: Sequence[Target],
    rows: Sequence[int],
    kernels: Kernels,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Prunes W `[columns, rows]` in place, the `rows` of several matrices side by side, each to its target, which are all
    unstructured or all of one n:m; returns the mask of its shape. Of several ranks each has its part of the rows (`_Rows`).

    A window's errors are moved into the other windows of its panel at once, and into the columns behind the panel
    together with those of the panel's other windows: as one product that is four times as deep, which is faster.
    """
    n, m = _n_of_m(targets[0])
    width = BLOCK - BLOCK % (m or 1)
    pairs = zip(targets, rows, strict=True)
    counts = [] if m else [zeros_in_parts(target, "sparsegpt", several, len(W)) for target, several in pairs]
    mask = torch.empty_like(W, dtype=torch.bool)
    errors = W.new_empty(min(PANEL * width, len(W)), W.shape[1])
    for panel in spans(len(W), PANEL * width):
        of_panel = errors[: panel.stop - panel.start]
        for inside in spans(len(of_panel), width):
            window = slice(panel.start + inside.start, panel.start + inside.stop)
            new, removed, own = W[window].t(), mask[window].t(), U[window, window]
            if not m:
                of_window = [of_matrix[window.start // width] for of_matrix in counts]
                _select_among_all(removed, new, own.diagonal(), rows, of_window, kernels, ranks)
            kernels.sweep_(new, of_panel[inside].t(), removed, own, n, m)
            rest = slice(window.stop, panel.stop)
            if rest.start < rest.stop:
                W[rest].addmm_(U[window, rest].t(), of_panel[inside], alpha=-1)
        if panel.stop < len(W):
            W[panel.stop :].addmm_(U[panel, panel.stop :].t(), of_panel, alpha=-1)
    return mask


def _select_among_all(
    removed: Tensor,
    new: Tensor,
    diagonal: Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    kernels: Kernels,
    ranks: Ranks,
) -> None:
    """`kernels.select_` for a window `[rows, width]` of which each rank has some rows."""
    if ranks.size == 1:
        kernels.select_(removed, new, diagonal, rows, counts)
        return
    here = _Rows.of(rows, ranks)
    everywhere = ranks.gather(new.t(), dim=1)[:, : here.total].t()
    chosen = torch.empty_like(everywhere, dtype=torch.bool)
    kernels.select_(chosen, everywhere, diagonal, rows, counts)
    removed.fill_(False)
    removed[: here.stop - here.start] = chosen[here.start : here.stop]


def _columns_of(weights: Sequence[Tensor], dtype: torch.dtype, here: _Rows) -> Tensor:
    """The matrices `[rows, columns]` as `[columns, rows]` side by side: a column is one run of memory. Only the rows that
    are solved here, and rows of zeros up to their `height`."""
    W = weights[0].new_empty(weights[0].shape[1], here.height, dtype=dtype)
    W[:, here.stop - here.start :] = 0.0
    start = 0
    for weight, own in zip(weights, here.of_each, strict=True):
        for part in weight[own].split(_rows_at_once(W.device)):
            W[:, start : start + len(part)] = part.t().contiguous()
            start += len(part)
    return W


def _stored(W: Tensor, dtype: torch.dtype) -> Tensor:
    """`[columns, rows]` as it will stand in the model: `[rows, columns]`, rounded, without a minus zero."""
    weight = W.new_empty(W.shape[1], W.shape[0], dtype=dtype)
    for span in spans(len(weight), _rows_at_once(W.device)):
        weight[span] = W[:, span].to(dtype, memory_format=torch.contiguous_format, copy=True).add_(0.0).t()
    return weight


def _rows_at_once(device: torch.device) -> int:
    """How many rows are copied or measured at a time: what a copy takes beside the weights, against small products."""
    return 8192 if device.type == "cuda" else 2048


def _wanda(weights: Sequence[Tensor], H: Hessian, targets: Sequence[Target], damping: float, ranks: Ranks) -> _Answer:
    """Wanda (Sun et al. 2023): |w| times the norm of its input, compared within each output row; nothing is updated."""
    norms = H.diagonal.sqrt()
    masks = [_by_score("wanda", W.abs() * norms, target) for W, target in zip(weights, targets, strict=True)]
    return _Answer(_masked(weights, masks), masks, norms == 0)


def _magnitude(
    weights: Sequence[Tensor], H: Hessian, targets: Sequence[Target], damping: float, ranks: Ranks
) -> _Answer:
    """|w|, compared within the whole matrix (Han et al. 2015); nothing is updated."""
    H.check()
    masks = [_by_score("magnitude", W.abs(), target) for W, target in zip(weights, targets, strict=True)]
    return _Answer(_masked(weights, masks), masks)


def _by_score(method: str, scores: Tensor, target: Target) -> Tensor:
    """Mask `[rows, columns]` of the smallest scores of each part, or of each m columns of a row."""
    n, m = _n_of_m(target)
    if m:
        return reference.smallest_in_groups(scores, m - n, m)
    counts = zeros_in_parts(target, method, *scores.shape)
    if len(counts) == 1:
        return reference.smallest(scores, counts[0])
    return reference.smallest_in_rows(scores, counts)


def _masked(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    return [W.masked_fill(mask, 0.0).add_(0.0).contiguous() for W, mask in zip(weights, masks, strict=True)]


METHODS = {"sparsegpt": _sparsegpt, "wanda": _wanda, "magnitude": _magnitude}


# -------------------------------------------------------------------------------------------- solutions


FINITE = 2  # numbers that are of the whole matrix; those behind them are added up over the ranks


def _numbers(own: slice, W: Tensor, weight: Tensor, mask: Tensor, dead: Tensor | None, H: Hessian) -> Tensor:
    """What the host wants to know of one matrix, in the order in which `_solution` reads it, in float64 on the device: of
    its rows in `own`, but whether it is `FINITE`."""
    counts = torch.zeros(4, dtype=torch.int64, device=W.device)
    for span in _spans_of(own, _rows_at_once(W.device)):
        removed = mask[span].t()  # [columns, rows], as it lies in memory
        zero = (weight[span] == 0).t().contiguous()
        extra = zero & ~removed
        in_dead = extra[:0] if dead is None else extra & dead[:, None]
        counts += torch.stack([which.count_nonzero() for which in (removed, zero, extra, in_dead)])
    ends = torch.stack([end.double() for tensor in (W, weight) for end in _ends(tensor)])  # NaN where there is one
    finite = ends.isfinite().view(2, 2).all(dim=1)
    return torch.cat([finite.double(), counts.double(), torch.stack(_energies(W, weight, H, own))])


def _spans_of(rows: slice, width: int) -> Iterator[slice]:
    return (slice(rows.start + span.start, rows.start + span.stop) for span in spans(rows.stop - rows.start, width))


def _ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest entry; a fast look wherever memory is contiguous."""
    return tensor.aminmax() if tensor.is_contiguous() else tensor.t().aminmax()


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
        weight=weight,
        mask=mask,
        zeros_asked=int(asked),
        zeros_found=int(found),
        why=", ".join(why),
        relative_error=change / energy if energy > 0 else 0.0,
        damping=answer.damping,
        rescue=answer.rescue,
    )


@torch.no_grad()
def relative_error(W: Tensor, weight: Tensor, H: Hessian) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = `weight` - `W`, both `[rows, columns]`; 0 where W H W^T is zero."""
    with full_precision():
        change, energy = torch.stack(_energies(W, weight, H, slice(0, len(W)))).tolist()
    return change / energy if energy > 0 else 0.0


def _energies(W: Tensor, weight: Tensor, H: Hessian, own: slice) -> tuple[Tensor, Tensor]:
    """What the rows in `own` give to tr(D H D^T) and tr(W H W^T), in units in which neither the weights nor H are tiny or
    huge."""
    lowest, highest = (end.to(H.sum.dtype) for end in _ends(W))
    scale = torch.maximum(highest, -lowest) * H.sum.diagonal().max().sqrt()
    change, energy = H.sum.new_zeros(2, dtype=torch.float64)
    at_once = min(own.stop - own.start, _rows_at_once(W.device))
    both = H.sum.new_empty(2, W.shape[1], at_once)  # [columns, rows], used again for all rows
    for span in _spans_of(own, max(1, at_once)):
        dense, difference = both[:, :, : span.stop - span.start]
        dense.copy_(W[span].t().contiguous())
        difference.copy_(weight[span].t().contiguous()).sub_(dense).div_(scale)
        change += quadratic_form(difference, H.sum)
        energy += quadratic_form(dense.div_(scale), H.sum)
    return change, energy
