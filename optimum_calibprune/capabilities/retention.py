# SPDX-License-Identifier: Apache-2.0
"""Dense and sparse scores in, retention by capability out, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..records import CAPABILITIES, CapabilityReport, CapabilityRetention, Scores, TaskRetention, TaskScore


RESAMPLES = 4000
AT_ONCE = 2**22  # item indices that may be in memory at once
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval


def capability_report(dense: Scores, sparse: Scores, *, seed: int = 0) -> CapabilityReport:
    """Retention of each capability: mean sparse score over mean dense score, across its tasks.

    The interval comes from 4000 bootstrap samples of the items, the same for dense and sparse (paired, so that items on
    which both agree add no width). To the items of each task come two of half their weight: one on which the dense model
    alone is right, one on which the sparse one is. Without them the interval is too narrow where hardly any item tells the
    two apart: `benchmarks/coverage.py`. Raises `ValueError` where the two were not measured on the same items.
    """
    return draws_report(dense, [sparse], seed=seed)


def report_of_both(dense: Scores, sparse: Scores) -> CapabilityReport:
    """Retention over the tasks of both; those that are missing stand among what was not measured."""
    of_both = {task.task for task in sparse.tasks}
    dense = replace(dense, tasks=tuple(task for task in dense.tasks if task.task in of_both))
    report = capability_report(dense, sparse)
    return replace(report, not_measured=report.not_measured | dense.missing_tasks | sparse.missing_tasks)


def task_retentions(dense: Scores, sparse: Scores, repos: Mapping[str, str]) -> tuple[TaskRetention, ...]:
    """Every task that both models were measured on, in the order of `dense`; `repos` are the data sets of some on the Hub."""
    after = {task.task: task for task in sparse.tasks}
    return tuple(
        _task_retention(task, after[task.task], repos.get(task.task, "")) for task in dense.tasks if task.task in after
    )


def _task_retention(dense: TaskScore, sparse: TaskScore, repo: str) -> TaskRetention:
    (alone,) = capability_report(Scores((dense,)), Scores((sparse,))).capabilities
    return TaskRetention(
        task=dense.task,
        capability=dense.capability,
        metric=dense.metric,
        items=len(dense.item_scores),
        dense=dense.value,
        sparse=sparse.value,
        shots=dense.shots,
        data=dense.data,
        chance=dense.chance,
        repo=repo,
        retention=alone.retention,
        interval=alone.interval,
    )


def draws_report(dense: Scores, draws: Sequence[Scores], *, seed: int = 0) -> CapabilityReport:
    """The same over several draws of the calibration set: the mean over draws, and a two-level interval, for which the
    draws are resampled first and then the items (the same items for all draws)."""
    generator = np.random.default_rng(seed)
    entries, replicates = [], []
    for capability in CAPABILITIES:
        missing = {name for scores in draws for name in scores.not_measured}
        tasks = [task for task in dense.tasks if task.capability == capability]
        if not tasks or capability in missing:
            continue
        matched = [[_counterpart(task, scores) for task in tasks] for scores in draws]
        entry, samples = _retention(capability, tasks, matched, generator)
        entries.append(entry)
        if samples is not None:
            replicates.append(samples)
    kept = {entry.capability: entry.retention for entry in entries if entry.retention is not None}
    return CapabilityReport(
        capabilities=tuple(entries),
        total=sum(kept.values()) / len(kept) if kept else None,
        total_interval=interval(np.mean(replicates, axis=0)) if replicates else None,
        worst=min(kept, key=lambda name: kept[name]) if kept else None,
        not_measured={name: why for scores in (dense, *draws) for name, why in scores.not_measured.items()},
    )


def _counterpart(task: TaskScore, scores: Scores) -> TaskScore:
    found = next((other for other in scores.tasks if other.task == task.task), None)
    if found is None or len(found.item_scores) != len(task.item_scores) or differ(task, found):
        raise ValueError(
            f"Task {task.task!r} was not measured on the same items in the same way for the dense and the "
            "sparse model."
        )
    return found


def differ(first: TaskScore, second: TaskScore) -> bool:
    """Whether two scores are known to be of different questions, or scored differently."""
    if first.metric != second.metric:
        return True
    both = bool(first.fingerprint and second.fingerprint)
    return both and (first.fingerprint, first.shots) != (second.fingerprint, second.shots)


def _retention(
    capability: str, tasks: list[TaskScore], draws: list[list[TaskScore]], generator: np.random.Generator
) -> tuple[CapabilityRetention, np.ndarray | None]:
    """Mean over tasks of each bootstrap sample: dense `[resamples]`, sparse `[draws, resamples]` -> their ratio."""
    dense_samples = np.zeros(RESAMPLES)
    sparse_samples = np.zeros((len(draws), RESAMPLES))
    added = ((1, 0), (0, 1)) if len(draws) == 1 else ()  # several draws scatter by more than the items
    for t, task in enumerate(tasks):
        means = resampled_means([task.item_scores, *(draw[t].item_scores for draw in draws)], generator, added)
        dense_samples += means[0] / len(tasks)
        sparse_samples += means[1:] / len(tasks)
    which = generator.integers(0, len(draws), (len(draws), RESAMPLES))
    sparse_mean = np.take_along_axis(sparse_samples, which, axis=0).mean(axis=0)
    dense = float(np.mean([task.value for task in tasks]))
    sparse = float(np.mean([[task.value for task in draw] for draw in draws]))
    chance = float(np.mean([task.chance for task in tasks]))
    above = interval(dense_samples)[0] > chance and dense_samples.min() > 0
    ratio = sparse_mean / dense_samples if above else None
    entry = CapabilityRetention(
        capability=capability,
        items=sum(len(task.item_scores) for task in tasks),
        chance=chance,
        dense=dense,
        sparse=sparse,
        retention=sparse / dense if above else None,
        interval=interval(ratio) if ratio is not None else None,
        above_chance=(sparse - chance) / (dense - chance) if above else None,
    )
    return entry, ratio


def resampled_means(
    rows: Sequence[Sequence[float]], generator: np.random.Generator, added: Sequence[Sequence[float]] = ()
) -> np.ndarray:
    """Means `[rows, resamples]` over items drawn with replacement, the same items for all rows. `added` items, each a score
    for every row, are drawn half as often as each of the others."""
    scores = np.array(rows)  # [rows, items]
    count = scores.shape[1]
    items = np.concatenate([scores, np.array(added).reshape(len(added), len(rows)).T], axis=1)
    parts = []
    for size in np.diff([*range(0, RESAMPLES, max(1, AT_ONCE // count)), RESAMPLES]):
        if added:
            halves = generator.integers(0, 2 * count + len(added), (size, count))
            chosen = np.where(halves < 2 * count, halves // 2, halves - count)
        else:
            chosen = generator.integers(0, count, (size, count))
        parts.append([row[chosen].mean(axis=1) for row in items])
    return np.concatenate(parts, axis=1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, LEVELS)
    return float(low), float(high)
