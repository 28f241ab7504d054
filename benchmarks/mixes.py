# SPDX-License-Identifier: Apache-2.0
"""Which calibration text keeps which capability of the pocket model: single sources, the uniform mix, IGSP.

    python benchmarks/mixes.py [--sparsity 50%] [--seeds 5] [--workers 2]

Every cell prunes the pocket anew and measures its four capabilities on all probes. Prints the README's table and writes
`benchmarks/results/mixes.json`: retention with 95 % intervals over draws and items, and the outcome of every item.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from optimum_calibprune import CalibPruner, machine, pocket
from optimum_calibprune.capabilities.retention import draws_report
from optimum_calibprune.records import CAPABILITIES, CapabilityReport, Scores


RESULT = Path(__file__).parent / "results" / "mixes.json"


def cells() -> dict[str, tuple[str, list[str]]]:
    """name -> (mix, sources)"""
    real = pocket.default_sources()
    generated = [name for name, source in pocket.sources().items() if source.upper_bound]
    singles = {name: (f"single:{name}", [name]) for name in real}
    return singles | {"uniform": ("uniform", real), "igsp": ("igsp", real), "generator texts": ("uniform", generated)}


def dense_scores() -> Scores:
    return CalibPruner.from_pretrained("pocket").evaluate()


def run(name: str, seed: int, sparsity: str, dense: Scores) -> tuple[str, int, Scores, float, float, float]:
    """One cell: sparse scores, seconds, and the perplexity and 4-gram duplicate rate of the calibration set."""
    import numpy as np
    import torch

    from optimum_calibprune.calibration import measure

    torch.set_num_threads(1)
    started = time.perf_counter()
    mix, sources = cells()[name]
    pruner = CalibPruner.from_pretrained("pocket", sparsity=sparsity, mix=mix, sources=sources, seed=seed)
    record = pruner.prune(dense_scores=dense)
    seconds = time.perf_counter() - started
    perplexity = float(np.exp(np.mean([np.log(sample.perplexity) for sample in record.samples])))
    duplicates = measure.duplicate_rate(measure.grams(pruner.calibration.input_ids))
    return name, seed, pruner.scores["sparse"], seconds, perplexity, duplicates


def row(name: str, report: CapabilityReport, perplexity: float, duplicates: float) -> str:
    kept = {entry.capability: entry for entry in report.capabilities}
    values = [_share(kept[c].retention, kept[c].interval) for c in CAPABILITIES]
    total = _share(report.total, report.total_interval)
    return " | ".join(
        ["", name, f"{perplexity:.1f}", f"{100 * duplicates:.1f} %", *values, f"**{total}**", ""]
    ).strip()


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "undefined"
    return f"{100 * value:.1f} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    dense = dense_scores()
    jobs = [(name, seed) for seed in range(given.seeds) for name in cells()]
    found: dict[str, list[tuple[int, Scores, float, float, float]]] = {name: [] for name in cells()}
    with ProcessPoolExecutor(given.workers) as workers:
        pending = [workers.submit(run, name, seed, given.sparsity, dense) for name, seed in jobs]
        for i, future in enumerate(pending):
            name, *rest = future.result()
            found[name].append(tuple(rest))
            print(f"{i + 1}/{len(jobs)} {name} seed {rest[0]}: {rest[2]:.0f} s", flush=True)
    results, lines = {}, []
    for name, draws in found.items():
        report = draws_report(dense, [scores for _, scores, *_ in draws])
        perplexity = sum(d[3] for d in draws) / len(draws)
        duplicates = sum(d[4] for d in draws) / len(draws)
        lines.append(row(name, report, perplexity, duplicates))
        results[name] = {
            "mix": cells()[name][0],
            "sources": cells()[name][1],
            "perplexity": perplexity,
            "duplicate_rate": duplicates,
            "report": report.to_dict(),
            "seconds": [round(d[2], 1) for d in draws],
            "items": {
                t.task: [_bits(t2.item_scores) for _, s, *_ in draws for t2 in s.tasks if t2.task == t.task]
                for t in dense.tasks
            },
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {
                "sparsity": given.sparsity,
                "seeds": given.seeds,
                "threads": 1,
                "versions": machine.versions(),
                "hardware": machine.hardware(torch.device("cpu")),
                "dense": {t.task: _bits(t.item_scores) for t in dense.tasks},
                "cells": results,
            },
            indent=1,
        )
        + "\n"
    )
    print("\n| calibration | perplexity | 4-gram duplicates | general | commonsense | code | math | total |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


def _bits(scores: Sequence[float]) -> str:
    return "".join(str(int(score)) for score in scores)


if __name__ == "__main__":
    main()
