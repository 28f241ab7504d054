# SPDX-License-Identifier: Apache-2.0
"""Which samples make which Hessian, and how those of several groups become one: added by trace, or to serve the worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..records import CalibrationSet
from .hessian import Hessian
from .ranks import ALONE, Ranks
from .sparsegpt import Solution, Target, relative_error, solve


ROUNDS = 4  # solutions of the minimax search beyond the first
STEP = 3.0  # its exponent: on the pocket's layers 1 needs four times the rounds, and 6 begins to swing
LEAST_FACTOR = 0.1  # an error counts as at least this share of the worst one, so that no group is lost for good


@dataclass(frozen=True)
class Share:
    """What one micro-batch gives to one Hessian: the positions of the samples (None: all of them) and their weights
    (None: each counts once)."""

    hessian: int
    samples: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Balance:
    """How the calibration rows make the Hessian of an input, as `CalibrationSet.normalise` says.

    `"none"`: one Hessian of all rows, each with its weight. `"trace"`: one Hessian H_g for each group g of rows, and the
    solver sees H = sum_g w_g H_g / tr(H_g), with w_g the mean weight of the group's rows: groups whose inputs are large
    do not drown the others. `"minimax"`: the same as a start; see `improve_worst`.

    `weights` are the w_g, `batches` the shares of each micro-batch.
    """

    normalise: str
    weights: tuple[float, ...]
    batches: tuple[tuple[Share, ...], ...]

    @classmethod
    def of(cls, calibration: CalibrationSet, micro_batch: int, device: torch.device) -> Balance:
        rows = calibration.rows
        names = list(dict.fromkeys(row.group for row in rows)) if calibration.normalise != "none" else []
        number = [names.index(row.group) if names else 0 for row in rows]
        weighted = any(row.weight != 1 for row in rows)
        batches = []
        for start in range(0, len(rows), micro_batch):
            several = range(start, min(start + micro_batch, len(rows)))
            shares = []
            for hessian in sorted({number[i] for i in several}):
                mine = [i for i in several if number[i] == hessian]
                weights = torch.tensor([rows[i].weight for i in mine]) if weighted else None
                samples = torch.tensor([i - start for i in mine], device=device)
                shares.append(Share(hessian, samples if len(mine) < len(several) else None, weights))
            batches.append(tuple(shares))
        by_group = [
            [row.weight for row, n in zip(rows, number, strict=True) if n == g] for g in range(max(number) + 1)
        ]
        return cls(calibration.normalise, tuple(sum(w) / len(w) for w in by_group), tuple(batches))

    def part(self, micro_batches: range) -> Balance:
        """The same for some of the micro-batches, which are counted anew."""
        return replace(self, batches=self.batches[micro_batches.start : micro_batches.stop])

    def empty(self, columns: int, device: torch.device) -> list[Hessian]:
        """The Hessians of one input, before anything has arrived."""
        return [Hessian(columns, device) for _ in self.weights]

    def add(self, hessians: Sequence[Hessian], micro_batch: int, x: Tensor) -> Tensor:
        """Adds the inputs `[samples, length, columns]` of one micro-batch.

        Returns:
            A flag on the device, False where NaN or infinity has entered.
        """
        finite = []
        for share in self.batches[micro_batch]:
            hessian = hessians[share.hessian]
            hessian.add(x if share.samples is None else x[share.samples], share.weights)
            finite.append(hessian.finite)
        return torch.stack(finite).all()

    def add_rows(self, hessians: Sequence[Hessian], micro_batch: int, x: Tensor, samples: Tensor) -> Tensor:
        """The same for some tokens of a micro-batch: their inputs `[tokens, columns]`, and the position in it of the sample
        that each is from."""
        for share in self.batches[micro_batch]:
            mine = slice(None) if share.samples is None else torch.isin(samples, share.samples)
            rows, positions = x[mine], samples[mine]
            if share.samples is not None:
                positions = torch.searchsorted(share.samples, positions)
            if len(rows):
                weights = None if share.weights is None else share.weights[positions.cpu()]
                hessians[share.hessian].add(rows, weights)
        return torch.stack([hessian.finite for hessian in hessians]).all()

    def combine(self, hessians: Sequence[Hessian]) -> Hessian:
        """The one Hessian that the solver sees (for `"minimax"`: sees first)."""
        return hessians[0] if self.normalise == "none" else Hessian.balanced(hessians, self.weights)


@dataclass
class Arrived:
    """What has arrived at one input: its Hessians, and after each micro-batch a flag on the device, whether they were
    finite. Nobody waits for the flags unless they are wanted.

    `again(i)` gives what micro-batch i brought, `[tokens, columns]`, and the position in it of each token's sample.
    """

    balance: Balance
    hessians: list[Hessian]
    again: Callable[[int], tuple[Tensor, Tensor]]
    finite: list[Tensor] = field(default_factory=list)

    def add(self, micro_batch: int, x: Tensor) -> None:
        """Adds the inputs `[samples, length, columns]` of one micro-batch."""
        self.finite.append(self.balance.add(self.hessians, micro_batch, x))

    def add_rows(self, micro_batch: int, x: Tensor, samples: Tensor) -> None:
        """Adds some of its tokens, see `Balance.add_rows`."""
        self.finite.append(self.balance.add_rows(self.hessians, micro_batch, x, samples))

    def not_finite_from(self) -> tuple[int, int] | None:
        """The micro-batch, and in it the sample, after which the Hessians were not finite; None where they were."""
        bad = (~torch.stack(self.finite)).nonzero()
        if not len(bad):
            return None
        micro_batch = int(bad[0])
        x, samples = self.again(micro_batch)
        largest = x.abs().amax(dim=1)  # NaN where a token holds one
        bad = (~largest.isfinite()).nonzero().flatten()
        return micro_batch, int(samples[bad[0] if len(bad) else largest.argmax()])


@torch.no_grad()
def improve_worst(
    W: Tensor,
    first: Solution,
    hessians: Sequence[Hessian],
    weights: Sequence[float],
    target: Target,
    *,
    method: str = "sparsegpt",
    damping: float = 0.01,
    rounds: int = ROUNDS,
    ranks: Ranks = ALONE,
) -> Solution:
    """Prunes one weight matrix so that the group that loses most loses as little as can be found.

    With e_g = tr(D H_g D^T) / tr(W H_g W^T) the relative error of a group, it lowers max_g e_g by multiplicative weights
    (Arora, Hazan and Kale 2012): multiply each w_g by e_g^STEP, solve for H = sum_g w_g H_g / tr(H_g), measure the e_g again.
    Where it settles, all groups that have weight lose the same share. Of `first` and the `rounds` solutions behind it the
    one with the smallest max_g e_g is returned; its `relative_error` is under the H that it was solved for.

    Args:
        W: the dense weights `[rows, columns]`, left as they are.
        first: the solution for `Hessian.balanced(hessians, weights)`.
        hessians: one for each group; weights: w_g at the start.

    Raises what `solve` raises.
    """

    def errors_of(solution: Solution) -> list[float]:
        return [relative_error(W, solution.weight, hessian) for hessian in hessians]

    best, errors, current = first, errors_of(first), list(weights)
    least = max(errors)
    for _ in range(rounds):
        worst = max(errors)
        if worst <= 0:
            break
        factors = [max(LEAST_FACTOR, error / worst) ** STEP for error in errors]
        current = [weight * factor for weight, factor in zip(current, factors, strict=True)]
        balanced = Hessian.balanced(hessians, current)
        solution = solve(W, balanced, target, method=method, damping=damping, ranks=ranks)
        errors = errors_of(solution)
        if max(errors) < least:
            best, least = solution, max(errors)
    return best
