# SPDX-License-Identifier: Apache-2.0
"""Rank correlation, permutation p-values and paired intervals, against scipy, enumeration and known truths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from optimum_calibprune.records import Scores, TaskScore
from optimum_calibprune.study.statistics import (
    Resampler,
    bootstrap_interval,
    compare,
    correlation,
    permutation_p_value,
    ranks,
    spearman,
)


def scores(*rows: tuple[str, np.ndarray]) -> Scores:
    return Scores(tuple(TaskScore(f"task_{name}", name, "x", 0.0, tuple(map(float, items))) for name, items in rows))


def shared(share: float, count: int) -> np.ndarray:
    """The first of `count` items right, so that two such rows agree as far as they can."""
    return (np.arange(count) < share * count).astype(float)


# -------------------------------------------------------------------------------------- rank correlation


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks(np.array([30.0, 10.0, 30.0, 20.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_spearman_by_hand() -> None:
    """Ranks 1 2 3 4 and 2 1 4 3: sum of squared differences 4, rho = 1 - 6 * 4 / (4 * 15) = 0.6."""
    assert spearman([1, 5, 9, 100], [0.2, 0.1, 0.4, 0.3]) == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(20))
def test_spearman_equals_scipys_with_and_without_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 5 + 20 * (seed % 2), (2, 12))
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


def test_a_constant_side_and_too_few_points_have_no_correlation() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert correlation([2.0] * 6, list(range(6))).rho is None
    few = correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert (few.points, few.rho, few.interval, few.p_value) == (4, None, None, None)
    with pytest.raises(ValueError, match="needs pairs; 3 and 2 values"):
        correlation([1, 2, 3], [1, 2])


# ------------------------------------------------------------------------------------------- permutations


def test_the_p_value_of_few_points_is_exact() -> None:
    """Of 5! = 120 orders of distinct values two have |rho| = 1."""
    assert permutation_p_value([1, 2, 3, 4, 5], [10, 20, 30, 40, 50]) == pytest.approx(2 / 120)
    assert permutation_p_value([1, 2, 3, 4, 5], [50, 40, 30, 20, 10]) == pytest.approx(2 / 120)


def _enumerated(x: np.ndarray, y: np.ndarray) -> float:
    orders = np.array(list(itertools.permutations(scipy.stats.rankdata(y))))
    a = scipy.stats.rankdata(x) - scipy.stats.rankdata(x).mean()
    found = np.abs((orders - orders.mean(axis=1, keepdims=True)) @ a)
    return float((found >= found[0] - 1e-9).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_equals_a_full_enumeration_with_ties(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 4, (2, 7))
    assert permutation_p_value(x, y) == pytest.approx(_enumerated(x, y))


def test_the_p_value_of_nine_points_is_near_the_full_enumeration() -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal(9)
    y = x + 1.5 * generator.standard_normal(9)
    exact = _enumerated(x, y)
    assert 0.005 < exact < 0.5
    assert permutation_p_value(x, y) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


def test_the_p_value_is_never_zero_and_depends_on_the_seed_alone() -> None:
    x = list(range(20))
    assert permutation_p_value(x, x) == 1 / 10_001
    noisy = [3, 1, 2, 0, *range(4, 12)][::-1]
    other = [5, 2, 9, 1, 0, 3, 7, 11, 4, 8, 10, 6]
    assert permutation_p_value(noisy, other, seed=1) == permutation_p_value(noisy, other, seed=1)
    assert permutation_p_value(noisy, other, seed=1) != permutation_p_value(noisy, other, seed=2)


def test_p_values_are_uniform_where_nothing_goes_together() -> None:
    generator = np.random.default_rng(0)
    found = [permutation_p_value(*generator.standard_normal((2, 10)), seed=i) for i in range(300)]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.085


# ---------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_rho_is_that_of_scipys_ranks_on_the_same_samples() -> None:
    generator = np.random.default_rng(5)
    x, y = generator.standard_normal((2, 15))
    y = y + 0.7 * x
    chosen = np.random.default_rng(0).integers(0, 15, (4000, 15))
    a, b = scipy.stats.rankdata(x[chosen], axis=1), scipy.stats.rankdata(y[chosen], axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    expected = np.percentile((a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)), (2.5, 97.5))
    assert bootstrap_interval(x, y) == pytest.approx(expected)
    found = correlation(x, y)
    assert found.rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.interval[0] < found.rho < found.interval[1]


def test_samples_without_a_correlation_are_left_out_and_most_of_them_leave_no_interval() -> None:
    one, other = [1] + [0] * 19, [0, 1] + [0] * 18
    assert bootstrap_interval(one, one) == (pytest.approx(1.0), pytest.approx(1.0))  # 64 % draw the one that differs
    assert bootstrap_interval(one, other) is None  # 40 % draw both


# ------------------------------------------------------------------------------------------- comparisons


def test_the_same_draws_do_not_differ() -> None:
    dense = scores(("code", shared(1.0, 50)), ("math", shared(0.9, 80)))
    draws = [scores(("code", shared(0.5, 50)), ("math", shared(0.3, 80)))] * 2
    resampler = Resampler(dense, ("code", "math"))
    found = compare("a", "b", "50%", (0, 1), resampler.totals(draws), resampler.totals(draws))
    assert found.difference == 0.0
    assert found.interval == (0.0, 0.0)


def test_a_total_is_the_mean_of_the_ratios_of_means() -> None:
    dense = scores(("code", shared(1.0, 50)), ("math", shared(0.8, 50)), ("general", shared(0.1, 50)))
    draws = [scores(("code", shared(s, 50)), ("math", shared(s, 50)), ("general", shared(s, 50))) for s in (0.2, 0.6)]
    assert Resampler(dense, ("code", "math")).totals(draws).mean == pytest.approx((0.4 / 1 + 0.4 / 0.8) / 2)


def test_the_interval_is_paired_over_items() -> None:
    """All items on which the two differ are won by the first: the difference has the deviation sqrt(.2 * .8 / 400)."""
    dense = scores(("code", shared(1.0, 400)))
    resampler = Resampler(dense, ("code",))
    a, b = (resampler.totals([scores(("code", shared(share, 400)))]) for share in (0.8, 0.6))
    found = compare("a", "b", "50%", (0,), a, b)
    assert found.difference == pytest.approx(0.2)
    width = found.interval[1] - found.interval[0]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 400), rel=0.08)


def test_the_interval_is_paired_over_draws() -> None:
    """Draws differ from each other, but the first mix wins by the same margin in each."""
    dense = scores(("code", shared(1.0, 400)))
    resampler = Resampler(dense, ("code",))
    a = resampler.totals([scores(("code", shared(share, 400))) for share in (0.3, 0.5, 0.9)])
    b = resampler.totals([scores(("code", shared(share, 400))) for share in (0.2, 0.4, 0.8)])
    moved = resampler.totals([scores(("code", shared(share, 400))) for share in (0.8, 0.2, 0.4)])
    paired, unpaired = (compare("a", "b", "50%", (0, 1, 2), a, other).interval for other in (b, moved))
    assert paired[1] - paired[0] < 0.3 * (unpaired[1] - unpaired[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """120 simulated studies with eight draws a mix, whose rates scatter by 0.08 around 0.7 and 0.6."""
    generator, covered = np.random.default_rng(0), 0
    for i in range(120):
        known = generator.random(100) < 0.9
        rates = generator.normal([[0.7], [0.6]], 0.08, (2, 8))
        a, b = ([scores(("math", known & (generator.random(100) < rate))) for rate in row] for row in rates)
        resampler = Resampler(scores(("math", known)), ("math",), seed=i)
        low, high = compare("a", "b", "50%", range(8), resampler.totals(a), resampler.totals(b)).interval
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 120 <= 0.99


def test_without_a_capability_above_chance_there_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        Resampler(scores(("math", shared(0.5, 9))), ()).totals([])
