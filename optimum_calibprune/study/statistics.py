# SPDX-License-Identifier: Apache-2.0
"""Rank correlation with permutation p-values and bootstrap intervals; the paired comparison of two mixes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..capabilities.retention import LEVELS, RESAMPLES
from ..records import Record, Scores, TaskScore


PERMUTATIONS = 10_000
EXACT_UP_TO = 8  # 8! = 40,320 permutations
TIE = 1e-12  # correlations closer than this are the same number
LEAST_POINTS = 5  # with fewer, no order is rarer than 1 in 12


# -------------------------------------------------------------------------------------- rank correlation


@dataclass(frozen=True)
class Correlation(Record):
    """Spearman's rho of `points` pairs, its 95 % bootstrap interval over the pairs, and the permutation p-value.

    All three are None where there are fewer than five pairs, or where one of the two sides is constant; the interval
    also where it is so in most of the bootstrap samples.
    """

    points: int
    rho: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


def correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation:
    """How two properties of the same things go together (Spearman 1904). Raises `ValueError` for different lengths."""
    if len(x) != len(y):
        raise ValueError(f"A correlation needs pairs; {len(x)} and {len(y)} values were given.")
    rho = spearman(x, y) if len(x) >= LEAST_POINTS else None
    if rho is None:
        return Correlation(len(x))
    return Correlation(len(x), rho, bootstrap_interval(x, y, seed=seed), permutation_p_value(x, y, seed=seed))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks; None where one side is constant."""
    rho = float(_pearson(ranks(np.asarray(x, dtype=float)), ranks(np.asarray(y, dtype=float))))
    return None if math.isnan(rho) else rho


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1..n along the last axis; equal values share the mean of their ranks."""
    less = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return less + (equal + 1) / 2


def permutation_p_value(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided: how often |rho| is at least as large when `y` is dealt out anew.

    All permutations up to 8 points; beyond, 10,000 of them by `seed`, and the observed one counts as one more (Phipson
    and Smyth 2010), so that the value is never 0. Neither side may be constant.
    """
    a, b = ranks(np.asarray(x, dtype=float)), ranks(np.asarray(y, dtype=float))
    observed = abs(float(_pearson(a, b))) - TIE
    if len(a) <= EXACT_UP_TO:
        orders = np.array(list(itertools.permutations(range(len(a)))))
        return float((np.abs(_pearson(a, b[orders])) >= observed).mean())
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(a)), (PERMUTATIONS, 1)), axis=1)
    extreme = int((np.abs(_pearson(a, b[orders])) >= observed).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)


def bootstrap_interval(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of rho when the pairs are drawn with replacement; samples without two different values on each side
    have no rho and are left out. None where that leaves out most of them."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    chosen = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    found = _pearson(ranks(a[chosen]), ranks(b[chosen]))
    found = found[~np.isnan(found)]
    return _interval(found) if len(found) > RESAMPLES / 2 else None


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one side is constant."""
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    size = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return (a * b).sum(axis=-1) / np.where(size > 0, size, np.nan)


# ------------------------------------------------------------------------------------- paired comparison


@dataclass(frozen=True)
class Comparison(Record):
    """Total retention of one mix minus that of another over the seeds that both have, with a 95 % two-level interval."""

    first: str
    second: str
    pattern: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Totals:
    """Total retention of one mix: the mean over its draws, and the same in each of 4000 bootstrap samples."""

    mean: float
    samples: np.ndarray


class Resampler:
    """Draws of one study, resampled: the same seed, items and draws for every mix, so that differences are paired.

    Draws are resampled first, then items. The same draws serve all capabilities (a draw is one pruned model), and the same
    items serve the dense model and all draws.
    """

    def __init__(self, dense: Scores, capabilities: Sequence[str], *, seed: int = 0) -> None:
        """`capabilities` are those whose retention is defined, as `draws_report` finds them."""
        self._seed = seed
        self._tasks = [
            [(i, task) for i, task in enumerate(dense.tasks) if task.capability == name] for name in capabilities
        ]
        self.capabilities = tuple(capabilities)
        self._counts: dict[int, np.ndarray] = {}

    def totals(self, draws: Sequence[Scores]) -> Totals:
        """`draws` stand in the order of their seeds; two mixes are paired where they have the same seeds.

        Raises `ValueError` where no capability has a retention.
        """
        if not self.capabilities:
            raise ValueError("No capability of the dense model is above chance: there is nothing to compare.")
        generator = np.random.default_rng([self._seed, len(draws)])
        which = generator.integers(0, len(draws), (RESAMPLES, len(draws)))
        kept, means = np.zeros(RESAMPLES), []
        for tasks in self._tasks:
            dense, sparse = np.zeros(RESAMPLES), np.zeros((RESAMPLES, len(draws)))
            point_dense, point_sparse = 0.0, 0.0
            for i, task in tasks:
                rows = np.array([task.item_scores, *(_same_task(scores, task).item_scores for scores in draws)])
                resampled = self._item_counts(i, len(task.item_scores)) @ rows.T / rows.shape[1]  # [resamples, rows]
                dense += resampled[:, 0]
                sparse += resampled[:, 1:]
                point_dense += float(rows[0].mean())
                point_sparse += float(rows[1:].mean())
            sparse_mean = np.take_along_axis(sparse, which, axis=1).mean(axis=1)
            kept += sparse_mean / np.where(
                dense > 0, dense, np.nan
            )  # a sample without a right dense answer is left out
            means.append(point_sparse / point_dense)
        return Totals(sum(means) / len(means), kept / len(means))

    def _item_counts(self, task: int, items: int) -> np.ndarray:
        """How often each item is drawn in each bootstrap sample, `[resamples, items]`."""
        if task not in self._counts:
            generator = np.random.default_rng([self._seed, 1, task])
            drawn = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
            self._counts[task] = drawn.astype(np.float32)
        return self._counts[task]


def _same_task(scores: Scores, task: TaskScore) -> TaskScore:
    return next(other for other in scores.tasks if other.task == task.task)


def compare(first: str, second: str, pattern: str, seeds: Sequence[int], a: Totals, b: Totals) -> Comparison:
    """`a` - `b`, both of the same `Resampler` over the same `seeds`."""
    return Comparison(first, second, pattern, tuple(seeds), a.mean - b.mean, _interval(a.samples - b.samples))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(samples, LEVELS)
    return float(low), float(high)
