# SPDX-License-Identifier: Apache-2.0
"""Factors in blocks against LAPACK's of the whole matrix, in float64; half of the matrix is poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimum_calibprune.pruning import triangular


SIZES = [1, 37, 512, 513, 1100]


def positive_definite(size: int) -> Tensor:
    X = torch.randn(2 * size + 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return X.t() @ X / len(X) + 0.1 * torch.eye(size, dtype=torch.float64)


def poisoned_below(H: Tensor) -> Tensor:
    return H.triu() + torch.full_like(H, torch.nan).tril(-1)


@pytest.mark.parametrize("size", SIZES)
def test_factor_is_the_cholesky_factor_from_the_last_column_on(size: int) -> None:
    H = positive_definite(size)
    F = poisoned_below(H)
    assert not triangular.factor_(F)
    expected = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(F.triu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_is_that_of_the_triangle(size: int) -> None:
    F = torch.linalg.cholesky(positive_definite(size), upper=True)
    found = poisoned_below(F)
    triangular.invert_(found)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found @ F, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("bad", [0, 600, 1099])
def test_a_matrix_that_is_not_positive_definite_is_flagged_wherever_it_fails(bad: int) -> None:
    H = positive_definite(1100)
    H[bad, bad] = -1.0
    assert triangular.factor_(H)


@pytest.mark.parametrize("size", SIZES)
def test_quadratic_form_reads_one_triangle(size: int) -> None:
    H = positive_definite(size)
    D = torch.randn(size, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = triangular.quadratic_form(D, poisoned_below(H))
    torch.testing.assert_close(found, (D * (H @ D)).sum(), rtol=1e-11, atol=0)
    assert triangular.quadratic_form(D.float(), H.float()).dtype == torch.float64
