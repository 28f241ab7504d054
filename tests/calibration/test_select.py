# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from optimum_calibprune.calibration.perplexity_balance import Balance, Imbalance, Level
from optimum_calibprune.calibration.select import LEAST, select


Case = tuple[np.ndarray, list[str], np.ndarray, dict[str, int]]


def random_case(seed: int) -> Case:
    """Few tokens, so that 4-grams repeat, and groups of unequal size and quota."""
    generator = np.random.default_rng(seed)
    count, length = int(generator.integers(4, 30)), int(generator.integers(4, 20))
    groups = generator.choice(["code", "general", "math"], count).tolist()
    ids = generator.integers(0, generator.integers(2, 6), (count, length))
    quota = {group: int(generator.integers(0, groups.count(group) + 1)) for group in sorted(set(groups))}
    quota[groups[0]] = max(quota[groups[0]], 1)
    return ids, groups, generator.normal(3, 1, count), quota


# -------------------------------------------------------------------- the definitions, without the index


def four_grams(sample: np.ndarray) -> list[tuple[int, ...]]:
    ids = sample.tolist()
    return [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]


def considered(ids: np.ndarray, groups: Sequence[str], quota: Mapping[str, int]) -> list[int]:
    """All but those with fewer than half the different 4-grams of the quota-th richest of their group."""
    distinct = [len(set(four_grams(sample))) for sample in ids]
    least = dict.fromkeys(groups, 0.0)
    for group, count in quota.items():
        if count:
            inside = [n for n, other in zip(distinct, groups, strict=True) if other == group]
            least[group] = sorted(inside, reverse=True)[count - 1] / 2
    return [i for i, group in enumerate(groups) if distinct[i] >= least[group]]


def naive_greedy(ids: np.ndarray, groups: Sequence[str], quota: Mapping[str, int]) -> list[int]:
    """Recomputes every gain at every step; the first of the best is taken."""
    left, covered, chosen = dict(quota), set[tuple[int, ...]](), list[int]()
    pool = considered(ids, groups, quota)
    while sum(left.values()):
        open_ones = [i for i in pool if left.get(groups[i], 0) > 0 and i not in chosen]
        best = max(open_ones, key=lambda i: (len(set(four_grams(ids[i])) - covered), -i))
        chosen.append(best)
        covered.update(four_grams(ids[best]))
        left[groups[best]] -= 1
    return chosen


def parts(case: Case, chosen: Sequence[int], kind: type[Balance]) -> tuple[float, float]:
    """A4 and B of a set, as the definition has them."""
    ids, groups, nll, quota = case
    pool = considered(ids, groups, quota)
    grams = [g for i in chosen for g in four_grams(ids[i])]
    mean = {g: np.mean([nll[i] for i in chosen if groups[i] == g]) for g in {groups[i] for i in chosen}}
    middle = sum(mean.values()) / len(mean)
    distance = max(abs(mean[g] - middle) for g in mean) if kind is Imbalance else middle - np.mean(nll[pool])
    deviation = float(np.std(nll[pool]))
    balance = distance / deviation if deviation > 1e-12 else 0.0
    return 1 - len(set(grams)) / len(grams), float(balance)


# ------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(40))
def test_quotas_are_exact_and_J_is_what_it_says(seed: int) -> None:
    case = ids, groups, nll, quota = random_case(seed)
    weight, kind = [0.0, 0.1, 1.0][seed % 3], [Imbalance, Level][seed % 2]
    found = select(ids, groups, nll, quota, balance_weight=weight, balance=kind)
    chosen = found.chosen.tolist()
    assert chosen == sorted(set(chosen))
    assert {group: [groups[i] for i in chosen].count(group) for group in quota} == quota
    assert found.left_out == len(ids) - len(considered(ids, groups, quota))
    aggregation, balance = parts(case, chosen, kind)
    assert found.parts == {
        "aggregation": pytest.approx(aggregation, abs=1e-9),
        kind.name: pytest.approx(balance, abs=1e-9),
        "lambda": weight,
    }
    assert found.trace[-1] == pytest.approx(aggregation + weight * balance, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_the_trace_begins_with_the_naive_greedy_and_then_falls(seed: int) -> None:
    case = ids, groups, nll, quota = random_case(seed)
    order = naive_greedy(ids, groups, quota)
    found = select(ids, groups, nll, quota, balance_weight=0.1)
    assert len(found.trace) >= len(order)
    for step, J in enumerate(found.trace[: len(order)], start=1):
        aggregation, balance = parts(case, order[:step], Imbalance)
        assert pytest.approx(aggregation + 0.1 * balance, abs=1e-9) == J
    falling = found.trace[len(order) - 1 :]
    assert all(after < before - LEAST for before, after in pairwise(falling))


@pytest.mark.parametrize("kind", [Imbalance, Level])
@pytest.mark.parametrize("seed", range(20))
def test_no_single_swap_lowers_J(seed: int, kind: type[Balance]) -> None:
    case = ids, groups, nll, quota = random_case(seed)
    weight = [0.03, 0.3, 3.0][seed % 3]
    found = select(ids, groups, nll, quota, balance_weight=weight, balance=kind, rounds=seed % 4)
    chosen = found.chosen.tolist()
    for out in chosen:
        for into in set(considered(ids, groups, quota)) - set(chosen):
            if groups[out] == groups[into]:
                aggregation, balance = parts(case, [i for i in chosen if i != out] + [into], kind)
                assert aggregation + weight * balance > found.trace[-1] - LEAST - 1e-12


def same(one: Case, other: Case) -> bool:
    first, second = (select(*case, balance_weight=0.1) for case in (one, other))
    return np.array_equal(first.chosen, second.chosen) and first.trace == second.trace and first.parts == second.parts


@pytest.mark.parametrize("seed", range(6))
def test_the_same_input_has_the_same_choice(seed: int) -> None:
    case = ids, groups, nll, quota = random_case(seed)
    assert same(case, case)
    assert same(case, (ids.astype(np.int32), groups, nll, dict(reversed(quota.items()))))
    names = {"code": "A", "general": "B", "math": "C"}
    assert same(case, (ids, [names[g] for g in groups], nll, {names[g]: count for g, count in quota.items()}))
    vocabulary = np.random.default_rng(seed).permutation(128256)
    assert same(case, (vocabulary[ids], groups, nll, quota)), "which number a token has means nothing"
    assert same(case, (ids, groups, 4 * nll, quota)), "nor does the unit of likelihood"


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_candidates_means_nothing_where_there_is_no_tie(seed: int) -> None:
    """Sample i has 60 + i tokens of its own, then one token that all share: no two gains are the same."""
    generator = np.random.default_rng(seed)
    ids = np.zeros((24, 90), dtype=int)
    for i in range(24):
        ids[i, : 60 + i] = 1 + 100 * i + np.arange(60 + i)
    nll, groups, quota = generator.normal(3, 1, 24), np.array(["code", "math"] * 12), {"code": 4, "math": 4}
    one = select(ids, groups, nll, quota, balance_weight=3.0, rounds=0)
    order = generator.permutation(24)
    other = select(ids[order], groups[order], nll[order], quota, balance_weight=3.0, rounds=0)
    assert sorted(order[other.chosen].tolist()) == one.chosen.tolist()
    assert len(one.trace) > 8, "there were swaps, too"


# ---------------------------------------------------------------------------------- against the very best


def pool_of_phrases(seed: int) -> Case:
    """Two groups of seven; the samples are made of shared phrases, and one group's perplexity is higher."""
    generator = np.random.default_rng(seed)
    vocabulary = int(generator.integers(4, 30))
    phrases = generator.integers(0, vocabulary, (12, 6))
    ids = phrases[generator.integers(0, 12, (14, 4))].reshape(14, 24)
    noise = generator.random(ids.shape) < 0.1
    ids[noise] = generator.integers(0, vocabulary, noise.sum())
    nll = generator.normal(3, 1, 14) + np.repeat(generator.normal(0, 1, 2), 7)
    return ids, ["code"] * 7 + ["math"] * 7, nll, {"code": 3, "math": 3}


def every_objective(case: Case, weight: float, kind: type[Balance]) -> np.ndarray:
    """J of all 35 x 35 choices of three from each group: 4-grams as bits of an integer, means by hand."""
    ids, _, nll, _ = case
    bit: dict[tuple[int, ...], int] = {}
    masks = [sum(1 << bit.setdefault(gram, len(bit)) for gram in set(four_grams(sample))) for sample in ids]
    found = []
    for triples in product(combinations(range(7), 3), combinations(range(7, 14), 3)):
        covered = 0
        for i in (*triples[0], *triples[1]):
            covered |= masks[i]
        means = [sum(nll[i] for i in triple) / 3 for triple in triples]
        distance = abs(means[0] - means[1]) / 2 if kind is Imbalance else sum(means) / 2 - nll.mean()
        found.append(1 - covered.bit_count() / (6 * 21) + weight * distance / nll.std())
    return np.array(found)


@pytest.mark.parametrize(("kind", "weight"), [(Imbalance, 0.1), (Imbalance, 1.0), (Level, 0.1), (Level, 1.0)])
def test_the_choice_is_the_best_one_or_close_to_it(kind: type[Balance], weight: float) -> None:
    """Over 200 pools (50 each): 0 is the best of all choices, 1 the mean of random ones."""
    gaps = []
    first = 50 * [(Imbalance, 0.1), (Imbalance, 1.0), (Level, 0.1), (Level, 1.0)].index((kind, weight))
    for seed in range(first, first + 50):
        case = pool_of_phrases(seed)
        J = every_objective(case, weight, kind)
        found = select(*case, balance_weight=weight, balance=kind)
        gaps.append((found.trace[-1] - J.min()) / (J.mean() - J.min()))
    assert min(gaps) > -1e-9
    assert np.percentile(gaps, 95) <= 0.02


def test_iterated_search_is_what_reaches_the_best() -> None:
    """The same pools without it stay well above; else the rounds would be a waste."""
    lost = []
    for seed in range(50):
        case = pool_of_phrases(seed)
        J = every_objective(case, 0.1, Imbalance)
        found = select(*case, balance_weight=0.1, rounds=0)
        lost.append((found.trace[-1] - J.min()) / (J.mean() - J.min()))
    assert np.percentile(lost, 95) > 0.05


# ------------------------------------------------------------------------------------------- what it does


def test_ties_go_to_the_earlier_candidate() -> None:
    ids = np.arange(60).reshape(6, 10)  # all equally varied
    assert select(ids, ["code"] * 6, np.arange(6.0), {"code": 2}, balance_weight=0.1).chosen.tolist() == [0, 1]


def test_a_copy_of_a_chosen_candidate_loses_to_a_poorer_one() -> None:
    one = np.arange(20)
    poorer = np.array([40] * 6 + list(range(50, 64)))
    ids = np.stack([one, one, poorer])
    assert select(ids, ["code"] * 3, np.arange(3.0), {"code": 2}, balance_weight=0.1).chosen.tolist() == [0, 2]


@pytest.mark.parametrize("kind", [Imbalance, Level])
@pytest.mark.parametrize("weight", [0.0, 0.1, 10.0])
def test_looping_candidates_are_never_chosen_where_there_are_enough_others(weight: float, kind: type[Balance]) -> None:
    """Not even where their tiny perplexity would bring one group down to the others."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 500, (60, 64))
    groups = np.repeat(["code", "math"], 30)
    nll = generator.normal(2.5, 0.4, 60) + np.where(groups == "math", 1.5, 0)
    looping = np.r_[0:20, 30:50]
    for i in looping:
        ids[i] = np.resize(generator.integers(0, 500, generator.integers(1, 6)), 64)
    nll[looping] = 0.02
    found = select(ids, groups.tolist(), nll, {"code": 8, "math": 8}, balance_weight=weight, balance=kind)
    assert not np.isin(found.chosen, looping).any()
    assert found.left_out == 40


def test_looping_candidates_fill_the_quota_where_there_are_too_few_others() -> None:
    ids = np.concatenate([np.tile([[5, 6, 7]], (3, 10)), np.arange(60).reshape(2, 30)])
    found = select(ids, ["code"] * 5, np.ones(5), {"code": 3}, balance_weight=0.1)
    assert found.chosen.tolist() == [0, 3, 4]


def test_a_weight_brings_perplexity_into_balance() -> None:
    generator = np.random.default_rng(0)
    ids = generator.zipf(1.5, (80, 60)) % 60
    groups = ["code", "math"] * 40
    nll = generator.normal(2.5, 0.5, 80) + np.tile([0, 1], 40)
    quota = {"code": 8, "math": 8}
    free, held = (select(ids, groups, nll, quota, balance_weight=weight) for weight in (0.0, 1.0))
    assert held.parts["imbalance"] < 0.01 < 0.1 < free.parts["imbalance"]
    assert free.parts["aggregation"] < held.parts["aggregation"]


class Strata:
    """The largest difference, over quarters of the pool by likelihood, between the shares chosen and one quarter."""

    name = "strata"

    def __init__(self, nll: np.ndarray, groups: np.ndarray) -> None:
        self.quarter = np.argsort(np.argsort(nll)) * 4 // len(nll)

    def value(self, chosen: np.ndarray) -> float:
        return float(np.abs(np.bincount(self.quarter[chosen], minlength=4) / len(chosen) - 0.25).max())

    def after_swaps(self, chosen: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
        return np.array([[self.value(np.append(chosen[chosen != i], j)) for j in into] for i in out])


def test_any_term_can_take_the_place_of_B() -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 4, (24, 12))
    found = select(
        ids, ["code", "math"] * 12, np.arange(24.0), {"code": 4, "math": 4}, balance_weight=1.0, balance=Strata
    )
    assert found.parts["strata"] == 0.0
    assert np.bincount(found.chosen * 4 // 24).tolist() == [2, 2, 2, 2]


# ------------------------------------------------------------------------------------------------- errors


IDS = np.arange(40).reshape(4, 10)
GROUPS = ["code", "code", "math", "math"]


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ({"code": 1, "math": 3}, r"3 samples of 'math' were asked for, 2 are candidates; give more candidates or ask"),
        ({"maths": 1}, r"Unknown group of the quotas 'maths'\. Did you mean 'math'\? Allowed: code, math\."),
        ({"code": -1}, r"-1 samples of 'code' were asked for; ask for a whole number, 0 or more\."),
        ({"code": 1.5}, r"1\.5 samples of 'code' were asked for; ask for a whole number"),
        ({"code": 0}, r"No samples were asked for; give at least one group a quota of 1 or more\."),
        ({}, r"No samples were asked for"),
    ],
)
def test_quotas_that_cannot_be_met_are_refused(quota: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(IDS, GROUPS, np.zeros(4), quota, balance_weight=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_likelihood_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"The likelihood of candidate 2 is {bad}, not a finite number; leave the"):
        select(IDS, GROUPS, np.array([0, 1, bad, bad]), {"code": 1}, balance_weight=0.1)


def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(
        ValueError, match="4 candidates, 4 groups and 3 likelihoods were given; give one group and one"
    ):
        select(IDS, GROUPS, np.zeros(3), {"code": 1}, balance_weight=0.1)
    with pytest.raises(ValueError, match="4 candidates, 3 groups and 4 likelihoods"):
        select(IDS, GROUPS[:3], np.zeros(4), {"code": 1}, balance_weight=0.1)
    with pytest.raises(ValueError, match=r"of 4 tokens or more; got \(4, 3\)\."):
        select(IDS[:, :3], GROUPS, np.zeros(4), {"code": 1}, balance_weight=0.1)
    for weight in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"must be 0 or more and finite; {weight} was given"):
            select(IDS, GROUPS, np.zeros(4), {"code": 1}, balance_weight=weight)
