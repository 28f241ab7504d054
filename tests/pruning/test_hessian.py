# SPDX-License-Identifier: Apache-2.0
"""The Hessian against X^T X in float64, its factor against the definition, and the rescue of matrices that fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimum_calibprune.pruning.hessian import Factor, Hessian, inverse_factor_


def inputs(tokens: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)


def hessian_of(*parts: Tensor, dtype: torch.dtype = torch.float32) -> Hessian:
    H = Hessian(parts[0].shape[-1], dtype=dtype)
    for part in parts:
        H.add(part)
    return H


def with_matrix(matrix: Tensor) -> Hessian:
    """A Hessian that holds any matrix, also one that no inputs could have given (but rounding could)."""
    H = Hessian(len(matrix), dtype=matrix.dtype)
    H.sum.copy_(matrix)
    H.tokens = 2.0
    return H


def inverse_factor(H: Tensor) -> Tensor | None:
    U = H.clone()
    return U if bool(inverse_factor_(U)) else None


def outer(X: Tensor) -> Tensor:
    """2/n X^T X in float64."""
    return 2 / len(X) * X.double().t() @ X.double()


def damped(matrix: Tensor, share: float) -> Tensor:
    matrix = matrix.double()
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def distance_from_identity(factor: Factor, matrix: Tensor) -> float:
    """|U^T U H - I|, the largest entry, for the damped H."""
    U = factor.U.double()
    product = U.t() @ U @ damped(matrix, factor.damping)
    return float((product - torch.eye(len(U), dtype=torch.float64)).abs().max())


# ------------------------------------------------------------------------------------------------ sums


def test_is_the_mean_of_the_outer_products() -> None:
    X = inputs(300, 17)
    H = hessian_of(X[:100], X[100:101], X[101:])
    torch.testing.assert_close(H.matrix.double(), outer(X), rtol=1e-5, atol=1e-6)
    assert H.tokens == 300
    exact = hessian_of(X[:100], X[100:], dtype=torch.float64)
    torch.testing.assert_close(exact.matrix, outer(X), rtol=1e-12, atol=1e-12)


def test_all_but_the_last_dimension_are_tokens() -> None:
    X = inputs(60, 5)
    for shape in ((60, 5), (6, 10, 5), (2, 3, 10, 5)):
        H = hessian_of(X.view(shape))
        assert H.tokens == 60
        torch.testing.assert_close(H.matrix.double(), outer(X), rtol=1e-5, atol=1e-6)


def test_inputs_need_not_be_contiguous_and_stay_as_they_are() -> None:
    X = inputs(5, 60).t().view(6, 10, 5)
    before = X.clone()
    torch.testing.assert_close(hessian_of(X).matrix.double(), outer(X.reshape(60, 5)), rtol=1e-5, atol=1e-6)
    assert torch.equal(X, before)


def test_no_graph_is_kept_of_inputs_that_need_gradients() -> None:
    assert not hessian_of(inputs(20, 4).requires_grad_()).matrix.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_neither_multiplied_nor_summed_in_sixteen_bits(dtype: torch.dtype) -> None:
    """A sum of ones in bf16 stops at 256, in fp16 at 2048; the square of 1 + eps fits into neither."""
    H = hessian_of(torch.ones(5000, 2, dtype=dtype), torch.ones(5000, 2, dtype=dtype))
    assert torch.equal(H.matrix, torch.full((2, 2), 2.0))
    eps = torch.finfo(dtype).eps
    one = hessian_of(torch.tensor([[1 + eps]], dtype=dtype))
    assert float(one.matrix) == 2 * (1 + eps) ** 2
    X = inputs(400, 9, dtype=dtype)
    torch.testing.assert_close(hessian_of(X).matrix.double(), outer(X), rtol=1e-5, atol=1e-6)


def test_large_fp16_inputs_do_not_overflow() -> None:
    H = hessian_of(torch.full((10, 3), 6e4, dtype=torch.float16))
    assert H.finite
    torch.testing.assert_close(H.matrix, torch.full((3, 3), 2 * 6e4**2), rtol=1e-3, atol=0.0)


def test_a_weight_counts_a_sample_as_often_as_it_says() -> None:
    X = inputs(30, 6).view(3, 10, 6)
    weighted = Hessian(6)
    weighted.add(X, torch.tensor([1.0, 3.0, 2.0]))
    repeated = hessian_of(X[0], X[1], X[1], X[1], X[2], X[2])
    assert weighted.tokens == repeated.tokens == 60
    torch.testing.assert_close(weighted.matrix, repeated.matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fractional_weights_are_those_of_a_weighted_mean(dtype: torch.dtype) -> None:
    X, weights = inputs(40, 6, dtype=dtype).view(4, 10, 6), torch.tensor([0.1, 0.7, 1.3, 2.4])
    H = Hessian(6)
    H.add(X[:2], weights[:2])
    H.add(X[2:], weights[2:])
    expected = 2 * torch.einsum("i,itc,itd->cd", weights.double(), X.double(), X.double()) / (10 * 4.5)
    torch.testing.assert_close(H.matrix.double(), expected, rtol=1e-5, atol=1e-6)
    assert H.tokens == pytest.approx(45)


def test_merging_is_as_if_one_had_seen_everything() -> None:
    X = inputs(70, 8)
    H, other = hessian_of(X[:20]), hessian_of(X[20:])
    H.merge(other)
    assert H.tokens == 70
    torch.testing.assert_close(H.matrix.double(), outer(X), rtol=1e-5, atol=1e-6)
    assert other.tokens == 50
    torch.testing.assert_close(other.matrix.double(), outer(X[20:]), rtol=1e-5, atol=1e-6)


def test_a_balanced_sum_gives_a_group_with_a_hundred_times_the_energy_no_more_say() -> None:
    """H = sum_g w_g H_g / tr(H_g), by hand in float64."""
    small, large = inputs(40, 6), 10 * inputs(90, 6, seed=1)
    assert float(outer(large).trace() / outer(small).trace()) == pytest.approx(100, rel=0.2)
    H = Hessian.balanced([hessian_of(small), hessian_of(large)], [1.0, 3.0])
    expected = 0.25 * outer(small) / outer(small).trace() + 0.75 * outer(large) / outer(large).trace()
    torch.testing.assert_close(H.matrix.double(), expected, rtol=1e-5, atol=1e-7)
    assert float(H.matrix.trace()) == pytest.approx(1, rel=1e-6)
    assert H.tokens == 130


def test_a_balanced_sum_does_not_see_the_scale_of_a_part() -> None:
    one, other = inputs(40, 6), inputs(90, 6, seed=1)
    expected = Hessian.balanced([hessian_of(one), hessian_of(other)], [1, 1])
    scaled = Hessian.balanced([hessian_of(one), hessian_of(other * 16)], [1, 1])  # a power of two: no rounding
    assert torch.equal(scaled.matrix, expected.matrix)
    assert torch.equal(scaled.factor().U, expected.factor().U)
    repeated = Hessian.balanced([hessian_of(one), hessian_of(other, other)], [2, 2])
    torch.testing.assert_close(repeated.matrix, expected.matrix, rtol=1e-5, atol=1e-8)


def test_a_balanced_sum_leaves_its_parts_alone_and_is_content_with_a_dead_one() -> None:
    alive, dead = hessian_of(inputs(40, 6)), hessian_of(torch.zeros(10, 6))
    before = alive.matrix
    H = Hessian.balanced([alive, dead], [1, 1])
    torch.testing.assert_close(H.matrix, before / before.trace() / 2, rtol=1e-5, atol=1e-8)
    assert H.tokens == 50
    assert torch.equal(alive.matrix, before)
    assert Hessian.balanced([dead, dead], [1, 1]).factor().dead.all()


def test_a_balanced_sum_of_what_is_not_finite_is_refused() -> None:
    bad = inputs(20, 6)
    bad[3, 2] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Hessian.balanced([hessian_of(inputs(20, 6)), hessian_of(bad)], [1, 1]).factor()


# ------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_nan_infinity_and_overflow_are_seen_and_refused(bad: float) -> None:
    X = inputs(20, 5)
    H = hessian_of(X)
    assert H.finite
    X[7, 2] = bad
    H.add(X)
    assert not H.finite
    for use in (H.factor, lambda: H.matrix):
        with pytest.raises(ValueError, match="NaN or infinity"):
            use()


def test_without_tokens_there_is_nothing_to_factor() -> None:
    H = Hessian(4)
    for use in (H.factor, lambda: H.matrix):
        with pytest.raises(ValueError, match="no tokens"):
            use()


# ---------------------------------------------------------------------------------------------- factor


@pytest.mark.parametrize("columns", [1, 2, 37, 130])
def test_inverse_factor_is_the_cholesky_factor_of_the_inverse(columns: int) -> None:
    H = outer(inputs(3 * columns, columns, dtype=torch.float64))
    U = inverse_factor(H)
    assert U is not None
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U, torch.linalg.cholesky(torch.linalg.inv(H), upper=True), rtol=1e-8, atol=1e-9)


def test_inverse_factor_of_two_by_two_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: H^-1 = [[2, -1], [-1, 2]] / 3, and U = [[a, b], [0, c]] has a^2 = 2/3, ab = -1/3, c^2 = 1/2."""
    U = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    expected = torch.tensor([[(2 / 3) ** 0.5, -((1 / 6) ** 0.5)], [0.0, 0.5**0.5]], dtype=torch.float64)
    torch.testing.assert_close(U, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("matrix", [[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]], [[-1.0]], [[math.nan]]])
def test_inverse_factor_is_none_where_the_matrix_is_not_positive_definite(matrix: list[list[float]]) -> None:
    assert inverse_factor(torch.tensor(matrix)) is None


@pytest.mark.parametrize("value", [1.0, 2.0, 3.0, 5.0, 7.0])
def test_inverse_factor_is_none_for_a_singular_matrix_whose_last_pivot_rounding_made_positive(value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        assert inverse_factor(torch.full((2, 2), value, dtype=dtype)) is None


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-3), (torch.float64, 1e-11)])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_factor_inverts_the_damped_hessian(dtype: torch.dtype, bar: float, damping: float) -> None:
    H = hessian_of(inputs(200, 50, dtype=torch.float64), dtype=dtype)
    factor = H.factor(damping)
    assert factor.U.dtype == dtype
    assert (factor.damping, factor.rescue) == (damping, "")
    assert factor.dead is None
    assert distance_from_identity(factor, H.matrix) < bar


def test_fewer_tokens_than_columns_need_no_rescue() -> None:
    H = hessian_of(inputs(10, 100))
    assert torch.linalg.matrix_rank(H.matrix) == 10
    assert H.factor().rescue == ""
    assert distance_from_identity(H.factor(), H.matrix) < 1e-3


def test_duplicate_inputs_need_no_rescue() -> None:
    H = hessian_of(inputs(300, 20).repeat(1, 4))
    assert H.factor().rescue == ""
    assert distance_from_identity(H.factor(), H.matrix) < 1e-3


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_a_condition_of_ten_to_the_eighth_needs_no_rescue(dtype: torch.dtype, bar: float) -> None:
    """One input a thousand times as large as the others, and directions that hardly occur."""
    basis = torch.linalg.qr(inputs(80, 80, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.logspace(-4, 4, 80, dtype=torch.float64)) @ basis.t()
    assert float(torch.linalg.cond(matrix)) == pytest.approx(1e8, rel=1e-3)
    H = with_matrix(matrix.to(dtype))
    factor = H.factor()
    assert factor.rescue == ""
    assert distance_from_identity(factor, matrix) < bar


def test_float64_factors_a_condition_of_ten_to_the_eighth_without_damping_to_speak_of() -> None:
    basis = torch.linalg.qr(inputs(80, 80, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.logspace(-4, 4, 80, dtype=torch.float64)) @ basis.t()
    factor = with_matrix(matrix).factor(1e-12)
    assert (factor.damping, factor.rescue) == (1e-12, "")
    assert distance_from_identity(factor, matrix) < 1e-6


def test_dead_inputs_are_marked_and_leave_the_others_as_they_are() -> None:
    X = inputs(100, 12)
    X[:, [2, 9]] = 0
    factor = hessian_of(X).factor(1e-3)
    assert factor.dead.nonzero().flatten().tolist() == [2, 9]
    alive = ~factor.dead
    shift = 1e-3 * outer(X).diagonal().mean() * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.inv(outer(X)[alive][:, alive] + shift)
    U = factor.U.double()[alive][:, alive]
    torch.testing.assert_close(U.t() @ U, expected, rtol=1e-4, atol=1e-5)


def test_all_inputs_dead_gives_a_factor_all_the_same() -> None:
    factor = hessian_of(torch.zeros(10, 5)).factor()
    assert factor.dead.all()
    assert factor.U.isfinite().all()
    assert factor.rescue == ""


@pytest.mark.parametrize("how", ["add", "merge"])
def test_new_inputs_make_the_factor_new(how: str) -> None:
    X = inputs(90, 6)
    H = hessian_of(X[:40])
    old = H.factor().U
    if how == "add":
        H.add(X[40:])
    else:
        H.merge(hessian_of(X[40:]))
    assert not torch.equal(H.factor().U, old)
    torch.testing.assert_close(H.factor().U, hessian_of(X[:40], X[40:]).factor().U, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- rescue


def coupled(c: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[[1, c], [c, 1]] has the eigenvalue 1 - c, so it takes a damping above c - 1."""
    return torch.tensor([[1.0, c], [c, 1.0]], dtype=dtype)


@pytest.mark.parametrize(
    ("c", "damping", "rescue"),
    [(1.005, 0.01, ""), (1.05, 0.1, "float64, damping 10%"), (1.5, 1.0, "float64, damping 100%")],
)
def test_rescue_takes_the_first_step_that_helps_and_records_it(c: float, damping: float, rescue: str) -> None:
    H = with_matrix(coupled(c))
    factor = H.factor()
    assert (factor.damping, factor.rescue) == (damping, rescue)
    assert factor.U.dtype == torch.float32
    assert distance_from_identity(factor, coupled(c)) < 1e-4


def test_float64_comes_before_more_damping() -> None:
    """Two inputs that are the same, with hardly any damping: in fp32 2 + 2e-8 is 2, and the matrix singular."""
    factor = hessian_of(torch.ones(50, 2)).factor(1e-8)
    assert (factor.damping, factor.rescue) == (1e-8, "float64")
    assert factor.U.dtype == torch.float32
    inverse = torch.linalg.inv(damped(torch.full((2, 2), 2.0), 1e-8))
    torch.testing.assert_close(factor.U.double(), torch.linalg.cholesky(inverse, upper=True), rtol=1e-6, atol=0.0)


def test_rescue_never_damps_less_than_was_asked() -> None:
    factor = with_matrix(coupled(1.5)).factor(0.3)
    assert (factor.damping, factor.rescue) == (1.0, "float64, damping 100%")
    tried = with_matrix(coupled(1.05)).factor(0.3)
    assert (tried.damping, tried.rescue) == (0.3, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_a_matrix_that_nothing_saves_is_an_error(dtype: torch.dtype, damping: float) -> None:
    with pytest.raises(ValueError, match="could not be factored"):
        with_matrix(coupled(2.5, dtype)).factor(damping)
