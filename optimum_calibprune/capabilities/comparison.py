# SPDX-License-Identifier: Apache-2.0
"""The scores of two runs in, what each kept side by side out, with McNemar's test for each task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..records import CapabilityComparison, RunComparison, Scores, TaskComparison, TaskScore
from .retention import capability_report, differ, interval, resampled_means


def compare(first: Mapping[str, Scores], second: Mapping[str, Scores], *, names: tuple[str, str]) -> RunComparison:
    """Two runs, each as its `dense` and `sparse` scores, over the tasks that both have; `names` are those of the runs.

    Raises `ValueError` where they have no task in common, or measured one of them on different items or in
    different ways.
    """
    known = [{task.task: task for task in run["sparse"].tasks} for run in (first, second)]
    shared = [name for name in known[0] if name in known[1]]
    if not shared:
        raise ValueError(
            f"{names[0]} and {names[1]} have no task in common: {', '.join(known[0]) or 'none'} and "
            f"{', '.join(known[1]) or 'none'}."
        )
    for name in shared:
        if not _same_items(name, first, second):
            raise ValueError(
                f"{names[0]} and {names[1]} were not measured on the same items of {name!r} in the same way, so that nothing is "
                "paired; measure both again with the same suite and limit."
            )
    ours, theirs = (_only(run, shared) for run in (first, second))
    reports = [capability_report(run["dense"], run["sparse"]) for run in (ours, theirs)]
    sets = [report.measured for report in reports]
    pairs = {entry.capability: entry for entry in reports[1].capabilities}
    generator = np.random.default_rng(0)
    return RunComparison(
        first=names[0],
        second=names[1],
        capabilities=tuple(
            CapabilityComparison(
                entry, pairs[entry.capability], *_difference(entry.capability, ours, theirs, generator)
            )
            if entry.retention is not None and pairs[entry.capability].retention is not None
            else CapabilityComparison(entry, pairs[entry.capability], None, None)
            for entry in reports[0].capabilities
            if entry.capability in pairs
        ),
        tasks=tuple(_compared(known[0][name], known[1][name]) for name in shared),
        totals=(reports[0].total, reports[1].total) if sets[0] == sets[1] and sets[0] else None,
        unpaired=tuple(sorted({*known[0]} ^ {*known[1]})),
    )


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: how often fair coins split the items on which two models differ at least
    as unevenly. Exact also for large counts, since whole numbers have no limit."""
    differing = only_first + only_second
    ways = tail = 1  # of choosing i items out of those, and of choosing up to i
    for i in range(min(only_first, only_second)):
        ways = ways * (differing - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**differing)


def _compared(first: TaskScore, second: TaskScore) -> TaskComparison:
    pairs = list(zip(first.item_scores, second.item_scores, strict=True))
    binary = all(value in (0, 1) for pair in pairs for value in pair)
    only_first, only_second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return TaskComparison(
        task=first.task,
        capability=first.capability,
        items=len(pairs),
        first=first.value,
        second=second.value,
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p_value(only_first, only_second) if binary else None,
    )


def _same_items(name: str, first: Mapping[str, Scores], second: Mapping[str, Scores]) -> bool:
    """By metric, shots and fingerprints; where one of these is missing, by the answers of the dense models, which must be
    equal."""
    sparse = [_task(run["sparse"], name) for run in (first, second)]
    dense = [_task(run["dense"], name) for run in (first, second)]
    if len({len(task.item_scores) for task in sparse}) > 1 or differ(*sparse):
        return False
    return all(task.fingerprint for task in sparse) or dense[0].item_scores == dense[1].item_scores


def _task(scores: Scores, name: str) -> TaskScore:
    found = next((task for task in scores.tasks if task.task == name), None)
    if found is None:
        raise ValueError(f"The dense model was not measured on task {name!r}, which its run has for the sparse one.")
    return found


def _only(run: Mapping[str, Scores], names: list[str]) -> dict[str, Scores]:
    return {
        state: Scores(tuple(_task(scores, name) for name in names), scores.not_measured)
        for state, scores in run.items()
    }


def _difference(
    capability: str, first: Mapping[str, Scores], second: Mapping[str, Scores], generator: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Retention of the first run minus that of the second, and its interval, over the same bootstrap samples of items."""
    sets = [run[state] for run in (first, second) for state in ("dense", "sparse")]
    tasks = [[task for task in scores.tasks if task.capability == capability] for scores in sets]
    added = ((1, 1, 1, 0), (1, 0, 1, 1))  # on one of them the first run alone is right, on the other one the second
    resampled = [
        resampled_means([task.item_scores for task in four], generator, added) for four in zip(*tasks, strict=True)
    ]
    samples = np.mean(resampled, axis=0)  # [dense, sparse, dense, sparse; resamples]
    samples = samples[:, (samples[0] > 0) & (samples[2] > 0)]
    dense, sparse, other_dense, other_sparse = (np.mean([task.value for task in of_model]) for of_model in tasks)
    return (
        float(sparse / dense - other_sparse / other_dense),
        interval(samples[1] / samples[0] - samples[3] / samples[2]),
    )
