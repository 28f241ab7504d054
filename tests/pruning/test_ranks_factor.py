# SPDX-License-Identifier: Apache-2.0
"""One factor that several processes make: that of one process within rounding, bit for bit the same on all; they fail together."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimum_calibprune.pruning.hessian import DIVIDED, Hessian
from optimum_calibprune.pruning.ranks import ALONE, Ranks
from optimum_calibprune.pruning.sparsegpt import solve
from optimum_calibprune.pruning.triangular import WIDTH
from optimum_calibprune.records import SparsityPattern
from tests.pruning.test_hessian import hessian_of, inputs, with_matrix
from tests.pruning.test_ranks import launch


RAGGED = 4 * WIDTH + 52
HALF = SparsityPattern(0.5)


def dead() -> Hessian:
    X = inputs(3000, 3 * WIDTH)
    X[:, [5, WIDTH, 2 * WIDTH - 1]] = 0
    return hessian_of(X)


def twins() -> Hessian:
    """Two inputs that are the same; with next to no damping fp32 cannot tell them apart."""
    X = inputs(3000, 3 * WIDTH)
    X[:, 1300] = X[:, 3]
    return hessian_of(X)


def coupled(c: float) -> Hessian:
    """The smallest eigenvalue is 1 - c, and the pivot that fails is in the first block: one process alone meets it."""
    matrix = torch.eye(3 * WIDTH)
    matrix[3, 9] = matrix[9, 3] = c
    return with_matrix(matrix)


def not_finite() -> Hessian:
    H = coupled(0.0)
    H.sum[700, 700] = float("nan")
    return H


CASES = {
    "a ragged last block": (lambda: hessian_of(inputs(3000, RAGGED)), 0.01),
    "fewer blocks than four processes": (lambda: hessian_of(inputs(3000, 2 * WIDTH + 1)), 0.01),
    "too small to be divided": (lambda: hessian_of(inputs(3000, DIVIDED)), 0.01),
    "fewer tokens than columns": (lambda: hessian_of(inputs(700, RAGGED)), 0.01),
    "dead inputs": (dead, 0.01),
    "float64": (twins, 1e-8),
    "more damping": (lambda: coupled(1.05), 0.01),
    "nothing helps": (lambda: coupled(2.5), 0.01),
    "not finite": (not_finite, 0.01),
}
SAVED = {"float64": "float64", "more damping": "float64, damping 10%"}
REFUSED = {"nothing helps": "NotFactored", "not finite": "NotFinite"}


def factored() -> dict[str, Any]:
    """Of each case U, its digest, and the rest; or the error."""
    found: dict[str, Any] = {}
    for case, (hessian, damping) in CASES.items():
        try:
            factor = hessian().factor(damping, Ranks.current())
        except ValueError as error:
            found[case] = type(error).__name__
            continue
        U = factor.U.numpy()
        marked = None if factor.dead is None else factor.dead.nonzero().flatten().tolist()
        rest = (hashlib.sha256(U).hexdigest(), factor.damping, factor.rescue, marked)
        found[case] = (U if Ranks.current().first else None, *rest)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return factored()


@pytest.mark.parametrize("count", [2, 4])
def test_the_factor_of_several_processes_is_that_of_one(count: int, alone: dict[str, Any]) -> None:
    found = launch(count, factored)
    for case, expected in alone.items():
        answers = [of_rank[case] for of_rank in found]
        if case in REFUSED:
            assert [expected, *answers] == [REFUSED[case]] * (count + 1)
            continue
        U, *rest = answers[0]
        assert all(answer[1:] == answers[0][1:] for answer in answers)
        assert rest[1:] == list(expected[2:])
        assert rest[2] == SAVED.get(case, "")
        assert np.array_equal(U, np.triu(U))
        assert np.linalg.norm(U - expected[0]) < 1e-5 * np.linalg.norm(expected[0])


def operations(ranks: Ranks | None = None) -> int:
    """Of the products of one process's part of a solve, nearly all of which is the factor."""

    def of_product(shape: Any, one: Any, other: Any, **options: Any) -> int:
        return 2 * one[0] * one[1] * other[1]

    W, H = inputs(8, RAGGED), hessian_of(inputs(700, RAGGED))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_product}) as counter:
        solve(W, H, HALF, ranks=ranks or Ranks.current())
    return counter.get_total_flops()


def test_each_process_has_its_part_of_the_operations() -> None:
    """Of five blocks, so that one of two processes has a block more than the other."""
    whole, parts = operations(ALONE), launch(2, operations)
    assert sum(parts) < 1.1 * whole
    assert max(parts) < 0.6 * whole
