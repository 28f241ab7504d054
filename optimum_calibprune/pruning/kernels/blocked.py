# SPDX-License-Identifier: Apache-2.0
"""The solver's kernels in torch, for the CPU and for GPUs without Triton; see `reference` for what they compute.

They go through memory column by column, so they are fast where `W.t()` is contiguous, and right everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..triangular import spans
from . import reference
from .precision import exact_bf16_inputs, full_precision


STEP = 16  # columns that are updated one by one; those to their right are updated for all of them at once
MOST_RANKED = 16  # groups of at most so many weights are ranked by comparing each with each


def select_(mask: Tensor, W: Tensor, diagonal: Tensor, rows: Sequence[int], counts: Sequence[int]) -> None:
    """See `reference.select_`."""
    scores = (W.t() / diagonal[:, None]).abs_()  # [width, rows]
    start = 0
    for several, count in zip(rows, counts, strict=True):
        part, chosen = scores[:, start : start + several], mask.t()[:, start : start + several]
        start += several
        if count <= 0:
            chosen.zero_()
            continue
        threshold = _kth_smallest(part, count)
        torch.le(part, threshold, out=chosen)
        surplus = int(chosen.count_nonzero()) - count
        if surplus:  # of equal scores, those at the last positions stay
            ties = (part.t() == threshold).nonzero()[-surplus:]
            chosen[ties[:, 1], ties[:, 0]] = False


def _kth_smallest(values: Tensor, k: int) -> float | Tensor:
    if values.device.type != "cpu":
        return values.flatten().kthvalue(k).values
    return float(np.partition(values.flatten().numpy(), k - 1)[k - 1])  # ten times faster than torch's


def sweep_(W: Tensor, errors: Tensor, mask: Tensor, U: Tensor, n: int = 0, m: int = 0) -> None:
    """See `reference.sweep_`."""
    columns, moved, removed = W.t(), errors.t(), mask.t()  # [width, rows]
    diagonal = U.diagonal()[:, None]
    share = torch.empty_like(columns) if m else removed.to(W.dtype)  # of a weight that goes: 1 or 0
    divisors = torch.empty_like(columns) if m else diagonal / share  # infinite where a weight is kept: no error
    for steps in spans(len(columns), m * max(1, STEP // m) if m else STEP):
        for j in range(steps.start, steps.stop):
            if m and j % m == 0:
                group = slice(j, j + m)
                removed[group] = _smallest_of(columns[group].div(diagonal[group]).abs_(), m - n)
                share[group] = removed[group]
                torch.div(diagonal[group], share[group], out=divisors[group])
            torch.div(columns[j], divisors[j], out=moved[j])
            columns[j + 1 : steps.stop].addr_(U[j, j + 1 : steps.stop], moved[j], alpha=-1)
        columns[steps.stop :].addmm_(U[steps, steps.stop :].t(), moved[steps], alpha=-1)
    columns.addcmul_(columns, share, value=-1)  # w - w is +0; where() takes eight times as long


def _smallest_of(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest scores of each column of `[m, rows]`, ties by position."""
    if len(scores) > MOST_RANKED:
        return reference.smallest_in_groups(scores.t(), count, len(scores)).t()
    ranks = [(scores[:k] <= scores[k]).sum(0) + (scores[k + 1 :] < scores[k]).sum(0) for k in range(len(scores))]
    return torch.stack(ranks) < count


def add_gram_(total: Tensor, x: Tensor) -> None:
    """See `reference.add_gram_`."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32:
        for block in spans(len(total)):
            total[block, block.start :] += torch.mm(x[:, block].t(), x[:, block.start :], out_dtype=torch.float32)
        return
    exact = x.dtype == torch.bfloat16 and total.dtype == torch.float32
    x = x.to(total.dtype)
    with exact_bf16_inputs() if exact else full_precision():
        for block in spans(len(total)):
            total[block, block.start :].addmm_(x[:, block].t(), x[:, block.start :])
