# SPDX-License-Identifier: Apache-2.0
"""Terms that keep a selection's perplexity in balance: the B of IGSP's objective J(S) = A4(S) + lambda B(S)."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Balance(Protocol):
    """A penalty on the log-perplexities of the chosen samples; small is good. It is made from the whole pool:
    `nll`, float64 `[samples]`, the log-perplexity of each candidate, and `groups`, int `[samples]`, its group's number."""

    name: str

    def __init__(self, nll: np.ndarray, groups: np.ndarray) -> None: ...

    def value(self, chosen: np.ndarray) -> float:
        """B of the samples with these indices."""
        ...

    def after_swaps(self, chosen: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
        """B after each swap of one chosen sample for one that is not, `[out, into]`; all of them are of one group."""
        ...


class Imbalance:
    """The largest distance of a group's mean log-perplexity from the mean of those means, over the standard deviation of
    log-perplexity in the pool; 0 where that is 0."""

    name = "imbalance"

    def __init__(self, nll: np.ndarray, groups: np.ndarray) -> None:
        self._nll, self._groups, self._scale = nll, groups, _deviation(nll)

    def value(self, chosen: np.ndarray) -> float:
        means = _means(self._nll, self._groups, chosen)
        return float(np.abs(means - means.mean()).max()) / self._scale

    def after_swaps(self, chosen: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
        own, others = _swapped_means(self._nll, self._groups, chosen, out, into)
        middle = (own + others.sum()) / (1 + len(others))
        largest = np.abs(own - middle)
        if len(others):
            largest = np.maximum(largest, np.maximum(others.max() - middle, middle - others.min()))
        return largest / self._scale


class Level:
    """The mean over the groups of the group's mean log-perplexity, as a distance from the pool's mean in standard deviations
    of the pool; 0 where those are 0. It is lowest where every group's samples are what the model finds likely; ours, not
    the paper's, and what measured retention asks for (`docs/study.md`)."""

    name = "level"

    def __init__(self, nll: np.ndarray, groups: np.ndarray) -> None:
        self._score, self._groups = (nll - nll.mean()) / _deviation(nll), groups

    def value(self, chosen: np.ndarray) -> float:
        return float(_means(self._score, self._groups, chosen).mean())

    def after_swaps(self, chosen: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
        own, others = _swapped_means(self._score, self._groups, chosen, out, into)
        return (own + others.sum()) / (1 + len(others))


def _deviation(nll: np.ndarray) -> float:
    """The standard deviation, and infinity where all values are one, so that a quotient is 0."""
    return float(nll.std()) if np.ptp(nll) > 0 else np.inf


def _means(values: np.ndarray, groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The mean of each group that has chosen samples."""
    counts = np.bincount(groups[chosen])
    sums = np.bincount(groups[chosen], weights=values[chosen])
    return sums[counts > 0] / counts[counts > 0]


def _swapped_means(
    values: np.ndarray, groups: np.ndarray, chosen: np.ndarray, out: np.ndarray, into: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the swaps' group after each of them, `[out, into]`, and those of the other groups."""
    inside = groups[chosen] == groups[out[0]]
    own = values[chosen[inside]]
    swapped = own.mean() + (values[into][None, :] - values[out][:, None]) / len(own)
    others = chosen[~inside]
    return swapped, _means(values, groups, others) if len(others) else np.zeros(0)
