# SPDX-License-Identifier: Apache-2.0
"""Which samples of which source make the calibration set, and why: single, uniform, weighted, IGSP."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import CalibrationRow, CalibrationSet, CalibrationSource, Mix, MixRule, unknown
from .measure import grams
from .sources import Pool


OVERSAMPLE = 4
BALANCE_WEIGHT = 0.1  # lambda of J


# ----------------------------------------------------------------------------------------------- quotas


def even_split(total: int, names: Iterable[str]) -> dict[str, int]:
    """`total` divided over `names`; the remainder goes to the first of them in alphabetical order."""
    ordered = sorted(names)
    share, rest = divmod(total, len(ordered))
    return {name: share + (i < rest) for i, name in enumerate(ordered)}


def quotas(rule: MixRule, sources: Sequence[CalibrationSource], samples: int) -> dict[str, int]:
    """How many samples each source gives; for IGSP, what it would give in the uniform mix.

    Raises `ValueError` where the rule names a source that is not among `sources`.
    """
    for name, _ in rule.weights:
        if name not in [source.name for source in sources]:
            raise unknown("source of the mix", name, [source.name for source in sources])
    if rule.kind == "single":
        return {rule.weights[0][0]: samples}
    if rule.kind == "weighted":
        return _weighted(dict(rule.weights), samples)
    counts: dict[str, int] = {}
    for capability, quota in capability_quotas(sources, samples).items():
        counts |= even_split(quota, [s.name for s in sources if s.capability == capability])
    return {name: count for name, count in counts.items() if count}


def capability_quotas(sources: Sequence[CalibrationSource], samples: int) -> dict[str, int]:
    return even_split(samples, {source.capability for source in sources})


def _weighted(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Largest remainders; ties to the first name in alphabetical order."""
    total = sum(weights.values())
    exact = {name: samples * weight / total for name, weight in sorted(weights.items())}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: samples - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def windows_wanted(rule: MixRule, sources: Sequence[CalibrationSource], samples: int) -> dict[str, int]:
    """How many windows are drawn from each source's pool: its quota, for IGSP its candidates."""
    factor = OVERSAMPLE if rule.kind == "igsp" else 1
    return {name: factor * count for name, count in quotas(rule, sources, samples).items()}


# ------------------------------------------------------------------------------------------------ draws


@dataclass(frozen=True)
class Candidates:
    """Windows drawn from the pools: ids `[candidates, length]` and, for each, where it comes from."""

    input_ids: np.ndarray
    rows: tuple[CalibrationRow, ...]


def draw(pools: Sequence[Pool], counts: Mapping[str, int], seed: int) -> Candidates:
    """Draws from each pool without replacement, by `seed` and the source's name alone; a pool with fewer gives all."""
    ids, rows = [], []
    for pool in sorted(pools, key=lambda p: (p.source.capability, p.source.name)):
        name = pool.source.name
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen = np.sort(generator.permutation(len(pool.input_ids))[: counts.get(name, 0)])
        ids.append(pool.input_ids[chosen])
        rows += [CalibrationRow(name, int(i), pool.source.capability) for i in chosen]
    return Candidates(np.concatenate(ids), tuple(rows))


def calibration_set(
    rule: MixRule, candidates: Candidates, counts: Mapping[str, int], nll: np.ndarray | None = None
) -> tuple[CalibrationSet, Mix]:
    """The calibration set of a mix, and the account of it.

    `nll` is each candidate's mean negative log-likelihood, which IGSP needs; the other mixes take all candidates.
    """
    if rule.kind == "igsp":
        assert nll is not None
        by_capability: dict[str, int] = {}
        capability_of = {row.origin: row.group for row in candidates.rows}
        for name, count in counts.items():
            by_capability[capability_of[name]] = by_capability.get(capability_of[name], 0) + count
        chosen, trace, parts = select(candidates, by_capability, nll)
    else:
        by_capability, trace, parts = dict(counts), (), {}
        chosen = list(range(len(candidates.rows)))
    rows = tuple(candidates.rows[i] for i in chosen)
    origins = [row.origin for row in rows]
    mix = Mix(
        rule=rule,
        quotas=by_capability,
        shares={name: origins.count(name) / len(rows) for name in sorted(set(origins))},
        note=_note(rule, counts),
        objective=trace[-1] if trace else None,
        parts=parts,
        trace=trace,
    )
    return CalibrationSet(candidates.input_ids[chosen], rows), mix


def _note(rule: MixRule, counts: Mapping[str, int]) -> str:
    """How shares that are no whole number became quotas."""
    if rule.kind == "single" or len(counts) == 1:
        return ""
    if rule.kind == "weighted":
        return "quotas are rounded by largest remainders, ties to the first names in alphabetical order"
    return "remainders, where there are any, go to the first names in alphabetical order"


# ------------------------------------------------------------------------------------------------- IGSP


def imbalance(nll: np.ndarray, groups: np.ndarray, scale: float) -> float:
    """B: the largest distance of a group's mean log-perplexity from the mean of those means, over `scale`."""
    means = np.array([nll[groups == group].mean() for group in np.unique(groups)])
    return float(np.abs(means - means.mean()).max() / scale) if scale > 0 else 0.0


def select(
    candidates: Candidates, quota: Mapping[str, int], nll: np.ndarray
) -> tuple[list[int], tuple[float, ...], dict[str, float]]:
    """IGSP's selection: exactly `quota` samples of each group, by lazy greedy on the number of distinct 4-grams.

    Every step takes the candidate that adds the most 4-grams not yet covered, among groups that are not full; ties go
    to the earlier candidate. Coverage is submodular, so a gain that was computed earlier can only have shrunk, and
    only the top of the heap is computed again (Minoux 1978).

    Returns:
        the chosen indices in ascending order, J = A4 + lambda B after each step, and the final parts of J.
    """
    groups = np.array([row.group for row in candidates.rows])
    for group, count in quota.items():
        if int((groups == group).sum()) < count:
            raise ValueError(f"{count} samples of {group!r} were asked for, {(groups == group).sum()} are candidates.")
    codes = grams(candidates.input_ids)
    distinct = [np.unique(row) for row in codes]
    covered = np.zeros(int(codes.max()) + 1, dtype=bool)
    scale = float(nll.std())
    left = dict(quota)
    heap = [(-len(row), i) for i, row in enumerate(distinct)]
    heapq.heapify(heap)
    chosen: list[int] = []
    trace: list[float] = []
    parts: dict[str, float] = {}
    while len(chosen) < sum(quota.values()):
        _, i = heapq.heappop(heap)
        if left.get(groups[i], 0) == 0:
            continue
        gain = int((~covered[distinct[i]]).sum())
        if heap and (-gain, i) > heap[0]:
            heapq.heappush(heap, (-gain, i))
            continue
        chosen.append(i)
        left[groups[i]] -= 1
        covered[distinct[i]] = True
        aggregation = 1.0 - int(covered.sum()) / (len(chosen) * codes.shape[1])
        balance = imbalance(nll[chosen], groups[chosen], scale)
        parts = {"aggregation": aggregation, "imbalance": balance, "lambda": BALANCE_WEIGHT}
        trace.append(aggregation + BALANCE_WEIGHT * balance)
    return sorted(chosen), tuple(trace), parts
