# SPDX-License-Identifier: Apache-2.0
"""How often do the 95 % intervals of retention, and of the difference of two runs, hold the truth?

    python benchmarks/coverage.py --output benchmarks/results/coverage.json

1000 simulated pairs of dense and sparse answers for each setting. A dense model is right with one probability; the sparse one is
right with another where the dense one is, and with a third where it is not. So the true retention is known.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from optimum_calibprune import machine
from optimum_calibprune.capabilities.comparison import compare
from optimum_calibprune.capabilities.retention import capability_report
from optimum_calibprune.records import Scores, TaskScore


TRIALS = 1000


@dataclass(frozen=True)
class Task:
    """Probabilities of one simulated task: `kept` where the dense model is right, `gained` where it is not."""

    items: int
    dense: float
    kept: float
    gained: float
    chance: float = 0.0

    @property
    def sparse(self) -> float:
        return self.dense * self.kept + (1 - self.dense) * self.gained


# One capability each, of one task or several; for differences the tasks of a second run on the same items beside.
RETENTION = {
    "30 items": [Task(30, 0.7, 0.7, 0.1)],
    "50 items": [Task(50, 0.8, 0.6, 0.1)],
    "100 items, hardly anything lost": [Task(100, 0.9, 0.97, 0.1)],
    "as HumanEval of a small model": [Task(164, 0.3, 0.5, 0.03)],
    "200 items": [Task(200, 0.8, 0.6, 0.1)],
    "400 items, hardly anything lost": [Task(400, 0.9, 0.97, 0.1, 0.25)],
    "400 items, hardly anything kept": [Task(400, 0.5, 0.05, 0.01)],
    "two tasks": [Task(100, 0.6, 0.8, 0.1, 0.25), Task(400, 0.8, 0.5, 0.05)],
    "1000 items": [Task(1000, 0.6, 0.9, 0.1, 0.25)],
}
DIFFERENCES = {
    "100 items": ([Task(100, 0.8, 0.7, 0.1)], [Task(100, 0.8, 0.6, 0.1)]),
    "200 items, hardly a difference": ([Task(200, 0.9, 0.95, 0.1)], [Task(200, 0.9, 0.94, 0.1)]),
}


def coverage(tasks: Sequence[Task], *, trials: int = TRIALS, seed: int = 0) -> dict[str, float]:
    """The share of the trials whose interval holds the true retention, and those that lie below it and above it."""
    truth = sum(task.sparse for task in tasks) / sum(task.dense for task in tasks)

    def interval(generator: np.random.Generator) -> tuple[float, float] | None:
        dense = [generator.random(task.items) < task.dense for task in tasks]
        sparse = _sparse(tasks, dense, generator)
        return capability_report(_scores(tasks, dense), _scores(tasks, sparse)).capabilities[0].interval

    return _shares(interval, truth, trials, seed)


def difference_coverage(
    first: Sequence[Task], second: Sequence[Task], *, trials: int = TRIALS, seed: int = 0
) -> dict[str, float]:
    """The same for the difference in retention of two sparse models of one dense model."""
    kept = [sum(task.sparse for task in tasks) / sum(task.dense for task in tasks) for tasks in (first, second)]

    def interval(generator: np.random.Generator) -> tuple[float, float] | None:
        dense = [generator.random(task.items) < task.dense for task in first]
        runs = [
            {"dense": _scores(tasks, dense), "sparse": _scores(tasks, _sparse(tasks, dense, generator))}
            for tasks in (first, second)
        ]
        return compare(*runs, names=("first", "second")).capabilities[0].interval

    return _shares(interval, kept[0] - kept[1], trials, seed)


def _sparse(tasks: Sequence[Task], dense: list[np.ndarray], generator: np.random.Generator) -> list[np.ndarray]:
    return [
        generator.random(task.items) < np.where(right, task.kept, task.gained)
        for task, right in zip(tasks, dense, strict=True)
    ]


def _scores(tasks: Sequence[Task], right: list[np.ndarray]) -> Scores:
    rows = [tuple(row.astype(float).tolist()) for row in right]
    return Scores(tuple(TaskScore(f"task {i}", "code", "", tasks[i].chance, row) for i, row in enumerate(rows)))


def _shares(
    interval: Callable[[np.random.Generator], tuple[float, float] | None], truth: float, trials: int, seed: int
) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    found = [interval(generator) for _ in range(trials)]
    ends = [pair for pair in found if pair is not None]  # the others are undefined, and say so
    below, above = (sum(pair[1] < truth for pair in ends), sum(pair[0] > truth for pair in ends))
    return {
        "truth": round(truth, 4),
        "intervals": len(ends),
        "covered": 1 - (below + above) / len(ends),
        "below": below / len(ends),
        "above": above / len(ends),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = []
    for name, tasks in RETENTION.items():
        rows.append({"of": "retention", "setting": name, "tasks": [asdict(task) for task in tasks], **coverage(tasks)})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "tasks"}), flush=True)
    for name, pair in DIFFERENCES.items():
        tasks = [[asdict(task) for task in of_run] for of_run in pair]
        rows.append({"of": "difference", "setting": name, "tasks": tasks, **difference_coverage(*pair)})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "tasks"}), flush=True)
    result = {"trials": TRIALS, "seconds": round(time.perf_counter() - started, 1), "rows": rows}
    result |= {"versions": machine.versions(), "hardware": machine.hardware(torch.device("cpu"))}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
