# SPDX-License-Identifier: Apache-2.0
"""The reference kernels against sorting in Python, against algebra, and against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optimum_calibprune.pruning.kernels import blocked, reference
from optimum_calibprune.pruning.kernels.reference import smallest, smallest_in_groups


def scores_of(rows: int, columns: int, kind: str) -> Tensor:
    """Scores with no ties, with many, all equal, or with values at the ends of the range of fp32."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    scores = torch.rand(rows, columns, generator=generator)
    if kind == "ties":
        return (scores * 4).floor()
    if kind == "equal":
        return torch.full_like(scores, 0.25)
    if kind == "extreme":
        values = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3e38, float("inf")])
        return values[(scores * len(values)).long()]
    return scores


def by_sorting(values: list[float], count: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda position: (values[position], position))
    return [position in set(order[:count]) for position in range(len(values))]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 37), (5, 1), (3, 7), (4, 128)])
def test_smallest_is_sorting_by_score_then_position(rows: int, columns: int, kind: str) -> None:
    scores = scores_of(rows, columns, kind)
    size = rows * columns
    for count in {0, 1, size // 3, size // 2, size - 1, size}:
        mask = smallest(scores, count)
        assert mask.shape == scores.shape
        assert mask.flatten().tolist() == by_sorting(scores.flatten().tolist(), count)


def test_smallest_reads_a_transposed_view_row_after_row() -> None:
    scores = scores_of(6, 4, "ties").t()
    assert smallest(scores, 9).flatten().tolist() == by_sorting(scores.flatten().tolist(), 9)


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 4, 4), (3, 12, 4), (2, 15, 5), (4, 128, 128), (3, 6, 1)])
def test_smallest_in_groups_is_sorting_each_group(rows: int, columns: int, size: int, kind: str) -> None:
    scores = scores_of(rows, columns, kind)
    for count in {0, 1, size // 2, size}:
        mask = smallest_in_groups(scores, count, size)
        assert mask.shape == scores.shape
        for found, group in zip(mask.reshape(-1, size), scores.reshape(-1, size), strict=True):
            assert found.tolist() == by_sorting(group.tolist(), count)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
@pytest.mark.parametrize(("rows", "width"), [((1,), 1), ((1,), 37), ((5, 2), 1), ((3, 40, 1), 7), ((70,), 128)])
def test_blocked_selection_equals_the_reference(rows: tuple[int, ...], width: int, kind: str, by_column: bool) -> None:
    W = scores_of(sum(rows), width, kind) - (0.5 if kind == "distinct" else 0.0)
    diagonal = torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.1
    if by_column:
        W = W.t().contiguous().t()
    for share in (0.0, 0.3, 0.5, 1.0):
        counts = [round(share * several * width) for several in rows]
        counts[0] = round((1 - share) * rows[0] * width)  # another one
        found, expected = torch.ones_like(W, dtype=torch.bool), torch.ones_like(W, dtype=torch.bool)
        blocked.select_(found, W, diagonal, rows, counts)
        reference.select_(expected, W, diagonal, rows, counts)
        assert torch.equal(found, expected)
        assert [int(part.sum()) for part in found.split(list(rows))] == counts


# ---------------------------------------------------------------------------------------------- gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (40, 37), (300, 513), (7, 1030)])
def test_blocked_gram_equals_the_reference_in_the_upper_triangle(
    tokens: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    start = torch.randn(columns, columns, generator=generator)
    found, expected = start.clone(), start.double()
    blocked.add_gram_(found, x)
    reference.add_gram_(expected, x)
    error = (found.double() - expected).triu().norm() / expected.triu().norm()
    assert float(error) < 1e-6


# --------------------------------------------------------------------------------------------- sweep


Sweep = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["reference", "blocked", "blocked, column by column in memory"])
def sweep(request: pytest.FixtureRequest) -> Sweep:
    """`sweep_` on copies, its outputs poisoned: new weights, errors, and the mask, which is chosen where it is None."""
    kernel = reference.sweep_ if request.param == "reference" else blocked.sweep_

    def on_copies(W: Tensor, U: Tensor, mask: Tensor | None, n: int = 0, m: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        given = [W.clone(), torch.full_like(W, torch.nan), torch.ones_like(W, dtype=torch.bool)]
        if mask is not None:
            given[2], n, m = mask.clone(), 0, 0
        if "column" in request.param:
            given = [tensor.t().contiguous().t() for tensor in given]
        kernel(*given, U, n, m)
        return tuple(given)

    return on_copies


def block(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, an upper triangular factor with a positive diagonal, and a mask of about half."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    W = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    U = torch.randn(width, width, generator=generator, dtype=torch.float64).triu(1) / width
    U.diagonal().copy_(torch.rand(width, generator=generator, dtype=torch.float64) + 0.5)
    return W, U.to(dtype), torch.rand(rows, width, generator=generator) < 0.5


def test_sweep_by_hand(sweep: Sweep) -> None:
    """Removing 3 with U_00 = 2 gives the error 1.5, which takes 1.5 * 4 from the next weight and 1.5 * -2 from the last;
    what is then 1 - 6 = -5 is removed with U_11 = 10, and its error -0.5 takes -0.5 * 6 from the last."""
    W = torch.tensor([[3.0, 1.0, 7.0]])
    U = torch.tensor([[2.0, 4.0, -2.0], [0.0, 10.0, 6.0], [0.0, 0.0, 5.0]])
    new, errors, mask = sweep(W, U, torch.tensor([[True, True, False]]))
    assert new.tolist() == [[0.0, 0.0, 7.0 + 3.0 + 3.0]]
    assert errors.tolist() == [[1.5, -0.5, 0.0]]
    assert mask.tolist() == [[True, True, False]]


def test_two_of_four_by_hand_chooses_on_updated_weights(sweep: Sweep) -> None:
    """By |w| / U_jj the first group loses 1 / 1 and 4 / 2. Its errors 1 and 2 take 1 * 5 + 2 * 1 from column 4, whose
    8 becomes 1 and is removed there, although 8 / 1 was the largest score of its group before."""
    W = torch.tensor([[1.0, 9.0, 4.0, 3.0, 8.0, 6.0, 7.0, 2.0]])
    U = torch.eye(8)
    U[2, 2] = 2.0
    U[0, 4], U[2, 4] = 5.0, 1.0
    new, errors, mask = sweep(W, U, None, 2, 4)
    assert mask.int().tolist() == [[1, 0, 1, 0, 1, 0, 0, 1]]
    assert new.tolist() == [[0.0, 9.0, 0.0, 3.0, 0.0, 6.0, 7.0, 0.0]]
    assert errors.tolist() == [[1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0, 2.0]]


SHAPES = [(1, 1), (1, 37), (5, 1), (3, 7), (9, 128)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_sweep_takes_errors_times_factor_from_the_weights(rows: int, width: int, sweep: Sweep) -> None:
    """All steps together are new = W - E U: at a removed weight that is 0, to the left of every error nothing changes."""
    W, U, removed = block(rows, width)
    new, errors, mask = sweep(W, U, removed)
    assert torch.equal(mask, removed)
    torch.testing.assert_close(new, W - errors @ U, rtol=1e-11, atol=1e-11)
    assert not new[removed].any()
    assert not errors[~removed].any()


@pytest.mark.parametrize(("rows", "width", "n", "m"), [(1, 4, 2, 4), (6, 128, 2, 4), (4, 15, 3, 5), (3, 128, 64, 128)])
def test_sweep_with_the_mask_it_chose_itself_is_the_same(rows: int, width: int, n: int, m: int, sweep: Sweep) -> None:
    W, U, _ = block(rows, width)
    new, errors, mask = sweep(W, U, None, n, m)
    assert (mask.reshape(rows, -1, m).sum(dim=2) == m - n).all()
    again = sweep(W, U, mask)  # which may sum in another order
    torch.testing.assert_close(again[0], new, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again[1], errors, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_sweep_without_removals_changes_nothing_and_with_all_leaves_nothing(
    rows: int, width: int, sweep: Sweep
) -> None:
    W, U, removed = block(rows, width)
    new, errors, _ = sweep(W, U, torch.zeros_like(removed))
    assert torch.equal(new, W)
    assert not errors.any()
    new, errors, _ = sweep(W, U, torch.ones_like(removed))
    assert not new.any()
    torch.testing.assert_close(errors @ U, W, rtol=1e-10, atol=1e-10)


def test_sweep_reads_only_the_upper_triangle(sweep: Sweep) -> None:
    W, U, removed = block(4, 20)
    poisoned = U + torch.full_like(U, 1e9).tril(-1)
    for mask, n, m in ((removed, 0, 0), (None, 2, 4)):
        for found, expected in zip(sweep(W, poisoned, mask, n, m), sweep(W, U, mask, n, m), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("given", [True, False])
def test_rows_do_not_know_of_each_other(given: bool, sweep: Sweep) -> None:
    W, U, removed = block(6, 32, torch.float32)
    whole = sweep(W, U, removed if given else None, 2, 4)
    for i in range(6):
        one = sweep(W[i : i + 1], U, removed[i : i + 1] if given else None, 2, 4)
        assert torch.equal(one[2], whole[2][i : i + 1])
        torch.testing.assert_close(one[0], whole[0][i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_sweep_gives_finite_numbers_for_tiny_and_huge_weights(scale: float, sweep: Sweep) -> None:
    W, U, removed = block(5, 64, torch.float32)
    for mask in (removed, None):
        new, errors, chosen = sweep(W * scale, U, mask, 2, 4)
        assert new.isfinite().all()
        assert errors.isfinite().all()
        assert not new[chosen].any()


@pytest.mark.parametrize(("rows", "width", "n", "m"), [(1, 37, 0, 0), (70, 128, 0, 0), (9, 128, 2, 4), (5, 66, 1, 33)])
def test_blocked_sweep_equals_the_reference_in_fp32(rows: int, width: int, n: int, m: int) -> None:
    W, U, removed = block(rows, width, torch.float32)
    found, expected = ((W.clone(), torch.full_like(W, torch.nan), removed.clone()) for _ in range(2))
    blocked.sweep_(*found, U, n, m)
    reference.sweep_(*expected, U, n, m)
    assert torch.equal(found[2], expected[2])
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_division_is_exact(sweep: Sweep) -> None:
    """w * (1 / u) differs from w / u in the last bit for one weight in four; over a sweep that compounds."""
    W = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) + 1
    U = torch.tensor([[1.3]])
    errors = sweep(W, U, torch.ones(1000, 1, dtype=torch.bool))[1]
    exact = (W.double() / U.double()).float()
    assert not torch.equal(W * (1 / U), exact)
    assert torch.equal(errors, exact)
