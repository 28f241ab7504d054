# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from optimum_calibprune.calibration.perplexity_balance import Balance, Imbalance, Level


TERMS = [Imbalance, Level]
ALL = np.arange(4)


def test_imbalance_by_hand() -> None:
    nll = np.array([1.0, 3.0, 5.0, 8.0])
    term = Imbalance(nll, np.array([0, 0, 1, 2]))  # means 2, 5, 8; their mean 5
    assert term.value(ALL) == pytest.approx(3 / nll.std())
    assert term.value(np.array([1, 2])) == pytest.approx(1 / nll.std())  # means 3, 5; their mean 4
    assert Imbalance(nll, np.zeros(4, dtype=int)).value(ALL) == 0.0


def test_level_by_hand() -> None:
    nll = np.array([1.0, 3.0, 5.0, 7.0])
    term = Level(nll, np.array([0, 0, 2, 2]))  # the pool's mean is 4
    assert term.value(ALL) == pytest.approx(0.0)
    assert term.value(np.array([0, 2])) == pytest.approx(-1 / nll.std())
    assert term.value(np.array([0, 1, 3])) == pytest.approx((-2 + 3) / 2 / nll.std())


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3])
def test_a_pool_of_one_likelihood_is_in_balance(kind: type[Balance], value: float) -> None:
    term = kind(np.full(7, value), np.array([0, 1, 1, 2, 2, 2, 2]))
    chosen = np.array([0, 1, 3, 4])
    assert term.value(chosen) == 0.0
    assert not term.after_swaps(chosen, np.array([3, 4]), np.array([5, 6])).any()


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("seed", range(20))
def test_a_swap_is_known_before_it_is_made(kind: type[Balance], seed: int) -> None:
    """Groups of any number and size, some of which have no chosen sample."""
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, generator.integers(1, 6), 40)
    term = kind(generator.normal(3, 1, 40), groups)
    chosen = np.sort(generator.permutation(40)[:12])
    for group in np.unique(groups[chosen]):
        out = chosen[groups[chosen] == group]
        into = np.setdiff1d(np.flatnonzero(groups == group), chosen)
        found = term.after_swaps(chosen, out, into)
        assert found.shape == (len(out), len(into))
        for row, i in enumerate(out):
            for column, j in enumerate(into):
                after = np.append(chosen[chosen != i], j)
                assert found[row, column] == pytest.approx(term.value(after), abs=1e-12)


@pytest.mark.parametrize("kind", TERMS)
def test_the_unit_of_likelihood_has_no_say(kind: type[Balance]) -> None:
    generator = np.random.default_rng(0)
    nll, groups = generator.normal(3, 1, 30), generator.integers(0, 4, 30)
    chosen = np.arange(0, 30, 2)
    in_nats, in_bits = kind(nll, groups).value(chosen), kind(nll / np.log(2) + 5, groups).value(chosen)
    assert abs(in_nats) > 0.01
    assert in_bits == pytest.approx(in_nats)
