# SPDX-License-Identifier: Apache-2.0
"""Which samples of which source make the calibration set, and why: the rules of all mixes."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import CalibrationRow, CalibrationSet, CalibrationSource, Mix, MixRule, require, unknown
from .cola import select_by_clusters
from .perplexity_balance import Balance, Imbalance, Level
from .select import select
from .sources import Pool
from .weighting import mixcal_weights


OVERSAMPLE = 4


# ----------------------------------------------------------------------------------------------- quotas


def even_split(total: int, names: Iterable[str]) -> dict[str, int]:
    """`total` divided over `names`; the remainder goes to the first of them in alphabetical order."""
    ordered = sorted(names)
    share, rest = divmod(total, len(ordered))
    return {name: share + (i < rest) for i, name in enumerate(ordered)}


def quotas(rule: MixRule, sources: Sequence[CalibrationSource], samples: int) -> dict[str, int]:
    """How many samples each source gives; for IGSP and COLA, what it would give in the uniform mix.

    Raises `ValueError` where the rule names a source that is not among `sources`, and for an option out of range.
    """
    _check_options(rule)
    for name, _ in rule.weights:
        if name not in [source.name for source in sources]:
            raise unknown("source of the mix", name, [source.name for source in sources])
    if rule.kind == "single":
        return {rule.weights[0][0]: samples}
    if rule.kind == "weighted":
        return _weighted(dict(rule.weights), samples)
    if rule.kind in ("self-cal", "sgs"):
        return {source.name: samples for source in sources if source.written}
    if rule.kind == "mixcal":  # capabilities are weighed in the Hessian, not by their number of samples
        counts = even_split(samples, [source.name for source in sources])
        return {name: count for name, count in counts.items() if count}
    counts = {}
    for capability, quota in capability_quotas(rule, sources, samples).items():
        counts |= even_split(quota, [s.name for s in sources if s.capability == capability])
    return {name: count for name, count in counts.items() if count}


def _check_options(rule: MixRule) -> None:
    if rule.kind == "balanced":
        worst = rule.option("worst")
        require(worst in (0, 1), f"balanced:worst is 0 (equal weights) or 1 (for the worst); {worst:g} was given.")
    if rule.kind == "mixcal":
        general = rule.option("general")
        require(0 < general < 1, f"mixcal:general is a share between 0 and 1, both excluded; {general:g} was given.")
    if rule.kind == "igsp":
        factor = rule.option("oversample")
        require(factor == int(factor) >= 1, f"igsp:oversample is a whole number from 1 on; {factor:g} was given.")
        terms = [name for name in ("level", "imbalance") if rule.option(name)]
        require(len(terms) < 2, "igsp takes one term beside aggregation; for igsp:imbalance=... also give level=0.")
    if rule.kind == "cola":
        layers = rule.option("layers")
        require(layers == int(layers), f"cola:layers is a whole number, 0 for all layers; {layers:g} was given.")


def capability_quotas(rule: MixRule, sources: Sequence[CalibrationSource], samples: int) -> dict[str, int]:
    """How many samples each capability gives: for IGSP by the weights of its options, else the same number."""
    capabilities = {source.capability for source in sources}
    if rule.kind != "igsp":
        return even_split(samples, capabilities)
    weights = {name: rule.option(name) for name in capabilities}
    require(sum(weights.values()) > 0, f"igsp needs a weight above 0 for one of {', '.join(sorted(capabilities))}.")
    return _weighted(weights, samples)


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
    """How many windows are drawn from each source's pool: its quota, for IGSP and COLA its candidates."""
    factor = int(rule.option("oversample")) if rule.kind == "igsp" else OVERSAMPLE if rule.kind == "cola" else 1
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
    rule: MixRule,
    candidates: Candidates,
    counts: Mapping[str, int],
    nll: np.ndarray | None = None,
    activations: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[CalibrationSet, Mix]:
    """The calibration set of a mix, and the account of it.

    `nll` is each candidate's mean negative log-likelihood, which IGSP needs; COLA needs `activations` and `seed`, see
    `cola.select_by_clusters`, and its quotas are what the clusters gave. The other mixes take all candidates.
    """
    if rule.kind == "igsp":
        assert nll is not None
        by_capability: dict[str, int] = {}
        capability_of = {row.origin: row.group for row in candidates.rows}
        for name, count in counts.items():
            by_capability[capability_of[name]] = by_capability.get(capability_of[name], 0) + count
        groups = [row.group for row in candidates.rows]
        term, weight = _balance(rule)
        selection = select(candidates.input_ids, groups, nll, by_capability, balance_weight=weight, balance=term)
        chosen, trace, parts = selection.chosen.tolist(), selection.trace, selection.parts
    elif rule.kind == "cola":
        assert activations is not None
        chosen, trace, parts = select_by_clusters(activations, sum(counts.values()), seed), (), {}
        by_capability = dict(Counter(candidates.rows[i].origin for i in chosen))
    else:
        by_capability, trace, parts = dict(counts), (), {}
        chosen = list(range(len(candidates.rows)))
    rows = tuple(candidates.rows[i] for i in chosen)
    if rule.kind == "mixcal":
        rows = mixcal_weights(rows, rule.option("general"))
    origins = [row.origin for row in rows]
    mix = Mix(
        rule=rule,
        quotas=by_capability,
        shares={name: origins.count(name) / len(rows) for name in sorted(set(origins))},
        note=_note(rule, counts),
        objective=trace[-1] if trace else None,
        parts=parts,
        trace=trace,
        normalise=_normalise(rule),
    )
    return CalibrationSet(candidates.input_ids[chosen], rows, mix.normalise), mix


def _balance(rule: MixRule) -> tuple[type[Balance], float]:
    """The term that IGSP's objective has beside aggregation, and its weight."""
    imbalance = rule.option("imbalance")
    return (Imbalance, imbalance) if imbalance else (Level, rule.option("level"))


def _normalise(rule: MixRule) -> str:
    """How the Hessians of the capabilities become one; see `CalibrationSet`."""
    if rule.kind != "balanced":
        return "none"
    return "minimax" if rule.option("worst") else "trace"


def _note(rule: MixRule, counts: Mapping[str, int]) -> str:
    """How shares that are no whole number became quotas."""
    if rule.kind == "single" or len(counts) == 1:
        return ""
    if rule.kind == "cola":
        return "one sample of each cluster of activations"
    if rule.kind == "weighted":
        return "quotas are rounded by largest remainders, ties to the first names in alphabetical order"
    return "remainders, where there are any, go to the first names in alphabetical order"
