# SPDX-License-Identifier: Apache-2.0
"""IGSP's selection: which candidates, exactly a quota of each group, make J(S) = A4(S) + lambda B(S) small.

A4 is the 4-gram aggregation of the chosen samples together, 1 - distinct / total (`coverage`), and B how far their
perplexity is from balance (`perplexity_balance`). Four steps, all deterministic:

1. Candidates that loop are left out, since their tiny perplexity is what a balance term may well want: those with fewer than
   half as many different 4-grams as the quota-th richest candidate of their group, which leaves the quota at least.
2. Greedy on the number of distinct 4-grams, which is submodular: every step takes the candidate that adds the most. The choices
   are those of the lazy greedy (Minoux 1978); its heap of stale bounds is not needed, since `Coverage` keeps every gain exact.
3. Swaps of a chosen sample for another of its group, at each step the one that lowers J the most, until none does.
4. Iterated local search (Lourenço, Martin and Stützle 2003), since swaps end in a local minimum: from the best choice so far,
   one sample of every group is exchanged at random, swaps follow, and the result stays if its J is lower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import unknown
from .coverage import GRAM, Coverage, distinct_grams
from .perplexity_balance import Balance, Imbalance


LEAST = 1e-9  # a swap must lower J by more; rounding moves J by 1e-15, one 4-gram of 128 x 2045 by 4e-6
LOOPING = 0.5  # of the different 4-grams of the quota-th richest candidate
ROUNDS = 32  # of iterated local search


@dataclass(frozen=True, eq=False)
class Selection:
    """`chosen`: indices in ascending order, int64 `[samples]`. `trace`: J after each greedy step (there are as many as samples
    chosen), after each swap, and after each round that found better. `parts`: J's terms and lambda. `left_out`: how many
    candidates loop."""

    chosen: np.ndarray
    trace: tuple[float, ...]
    parts: dict[str, float]
    left_out: int


def select(
    input_ids: np.ndarray,
    groups: Sequence[str],
    nll: np.ndarray,
    quota: Mapping[str, int],
    *,
    balance_weight: float,
    balance: type[Balance] = Imbalance,
    rounds: int = ROUNDS,
) -> Selection:
    """Chooses exactly `quota` samples of each group; no swap of two samples of a group lowers J by more than 1e-9.

    Ties go to the earlier candidate. Building the index of shared 4-grams takes about 40 bytes for each 4-gram of the pool.

    Args:
        input_ids: the candidates' token ids, `[candidates, length]`, of at least 4 tokens.
        groups: the group of each candidate.
        nll: the mean negative log-likelihood (nats) of each candidate, `[candidates]`.
        quota: how many of each group to choose.
        balance_weight: lambda of J.
        balance: which B.
        rounds: of iterated local search; 0 ends at the first local minimum.

    Raises:
        ValueError: the arguments do not fit each other, a group is unknown or has fewer candidates than its quota, or a
            likelihood is not finite.
    """
    names, numbers = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    nll = np.asarray(nll, dtype=np.float64)
    _check(input_ids, numbers, nll, balance_weight)
    _check_quota(quota, dict(zip(names.tolist(), np.bincount(numbers).tolist(), strict=True)))
    quotas = np.array([quota.get(name, 0) for name in names.tolist()])
    pool = _not_looping(distinct_grams(input_ids), numbers, quotas)
    in_balance = balance(nll[pool], numbers[pool])
    search = _Search(Coverage(input_ids[pool]), numbers[pool], in_balance, balance_weight)
    trace = search.greedy(quotas)
    trace += search.swap()
    trace += search.iterate(rounds)
    parts = {
        "aggregation": search.aggregation(),
        balance.name: in_balance.value(search.chosen),
        "lambda": balance_weight,
    }
    return Selection(pool[search.chosen], tuple(trace), parts, len(input_ids) - len(pool))


def _not_looping(distinct: np.ndarray, groups: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """The indices of the candidates that are worth choosing from."""
    least = np.zeros(len(quotas))
    for group in np.flatnonzero(quotas):
        richest = np.sort(distinct[groups == group])[::-1]
        least[group] = LOOPING * richest[quotas[group] - 1]
    return np.flatnonzero(distinct >= least[groups])


def _check(input_ids: np.ndarray, groups: np.ndarray, nll: np.ndarray, balance_weight: float) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < GRAM:
        raise ValueError(f"Candidates must be [candidates, length], of {GRAM} tokens or more; got {input_ids.shape}.")
    if not len(input_ids) == len(groups) == len(nll):
        raise ValueError(
            f"{len(input_ids)} candidates, {len(groups)} groups and {len(nll)} likelihoods were given; "
            "give one group and one likelihood for each candidate."
        )
    if not np.isfinite(nll).all():
        bad = int(np.flatnonzero(~np.isfinite(nll))[0])
        raise ValueError(
            f"The likelihood of candidate {bad} is {nll[bad]}, not a finite number; leave the candidate out."
        )
    if not 0 <= balance_weight < math.inf:
        raise ValueError(f"The weight of the balance term must be 0 or more and finite; {balance_weight} was given.")


def _check_quota(quota: Mapping[str, int], candidates: Mapping[str, int]) -> None:
    for group, count in quota.items():
        if count < 0 or count != int(count):
            raise ValueError(f"{count} samples of {group!r} were asked for; ask for a whole number, 0 or more.")
        if count and group not in candidates:
            raise unknown("group of the quotas", group, candidates)
        if count > candidates.get(group, 0):
            raise ValueError(
                f"{count} samples of {group!r} were asked for, {candidates[group]} are candidates; "
                "give more candidates or ask for fewer samples."
            )
    if sum(quota.values()) == 0:
        raise ValueError("No samples were asked for; give at least one group a quota of 1 or more.")


class _Search:
    """The choice as it stands, `chosen` in ascending order, and the steps to a better one; each returns J along its way."""

    def __init__(self, cover: Coverage, groups: np.ndarray, balance: Balance, weight: float) -> None:
        self.cover, self.groups, self.balance, self.weight = cover, groups, balance, weight
        self.chosen = np.zeros(0, dtype=np.int64)

    def aggregation(self) -> float:
        return 1.0 - self.cover.distinct / (len(self.chosen) * self.cover.windows)

    def objective(self) -> float:
        return self.aggregation() + self.weight * self.balance.value(self.chosen)

    def greedy(self, quota: np.ndarray) -> list[float]:
        """Fills the quotas, `[groups]`, with the sample that adds the most 4-grams; J after each."""
        left = quota.copy()
        free = np.ones(len(self.groups), dtype=bool)
        trace = []
        while left.any():
            best = int(np.where(free & (left[self.groups] > 0), self.cover.alone, -1).argmax())
            free[best] = False
            left[self.groups[best]] -= 1
            self.cover.add(best)
            self.chosen = np.sort(np.append(self.chosen, best))
            trace.append(self.objective())
        return trace

    def swap(self) -> list[float]:
        """Takes the best swap until none lowers J; J after each."""
        trace: list[float] = []
        while (found := self.best_swap()) is not None:
            self.exchange(*found)
            trace.append(self.objective())
        return trace

    def best_swap(self) -> tuple[int, int] | None:
        """The swap that lowers J the most, if one does: the sample that goes, the sample that comes."""
        lowest, found = self.objective() - LEAST, None
        for out, into in self.exchangeable():
            overlap = np.stack([self.cover.overlap(sample)[into] for sample in out.tolist()])
            distinct = self.cover.distinct - self.cover.alone[out][:, None] + self.cover.alone[into][None, :] + overlap
            J = 1.0 - distinct / (len(self.chosen) * self.cover.windows)
            J += self.weight * self.balance.after_swaps(self.chosen, out, into)
            row, column = divmod(int(J.argmin()), len(into))
            if J[row, column] < lowest:
                lowest, found = float(J[row, column]), (int(out[row]), int(into[column]))
        return found

    def iterate(self, rounds: int) -> list[float]:
        """Exchanges one sample of each group at random, swaps, and keeps the result if it is better; J where it was."""
        generator = np.random.default_rng(0)
        best, lowest = self.chosen, self.objective()
        trace = []
        for _ in range(rounds):
            for out, into in self.exchangeable():
                self.exchange(int(generator.choice(out)), int(generator.choice(into)))
            self.swap()
            if self.objective() < lowest - LEAST:
                best, lowest = self.chosen, self.objective()
                trace.append(lowest)
            else:
                self.return_to(best)
        return trace

    def exchangeable(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each group, the chosen samples and the others, where there are both."""
        free = np.ones(len(self.groups), dtype=bool)
        free[self.chosen] = False
        of_group = self.groups[self.chosen]
        pairs = [(self.chosen[of_group == g], np.flatnonzero(free & (self.groups == g))) for g in np.unique(of_group)]
        return [(out, into) for out, into in pairs if len(into)]

    def exchange(self, out: int, into: int) -> None:
        self.cover.remove(out)
        self.cover.add(into)
        self.chosen = np.sort(np.where(self.chosen == out, into, self.chosen))

    def return_to(self, chosen: np.ndarray) -> None:
        for sample in np.setdiff1d(self.chosen, chosen).tolist():
            self.cover.remove(sample)
        for sample in np.setdiff1d(chosen, self.chosen).tolist():
            self.cover.add(sample)
        self.chosen = chosen
