# SPDX-License-Identifier: Apache-2.0
"""Does OWL help? The pocket model at 50 and 60 %, the same sparsity in all blocks against OWL's.

    python benchmarks/allocation.py --mix uniform    # of the bundled real texts, WikiText-2 left out
    python benchmarks/allocation.py --mix igsp       # what the model writes

Each seed draws one calibration set, with which both are pruned by SparseGPT. Compared are the retention over the bundled
probes, 400 a capability, and the perplexity on WikiText-2. Writes its mix's part of `benchmarks/results/allocation.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from optimum_calibprune import CalibPruner, RunRecord, machine, pocket
from optimum_calibprune.records import CAPABILITIES, Scores
from optimum_calibprune.values import ALLOCATIONS


RESULT = Path(__file__).parent / "results" / "allocation.json"
HELD_OUT = "wikitext2"
SPARSITIES = ("50%", "60%")
MIXES = ("uniform", "igsp")


def pruner(mix: str, sparsity: str = "50%", allocation: str = "uniform", seed: int = 0) -> CalibPruner:
    real = [name for name in pocket.default_sources() if name != HELD_OUT]
    options = {"mix": mix, "sources": real if mix == "uniform" else None, "seed": seed}
    text = pocket.sources()[HELD_OUT].path
    return CalibPruner.from_pretrained(
        pocket.NAME, sparsity=sparsity, allocation=allocation, perplexity_text=text, **options
    )


def by_block(run: RunRecord) -> list[float]:
    """The sparsity of each block, rounded as it is read."""
    asked: dict[str, list[int]] = {}
    for layer in run.prune.layers:
        counts = asked.setdefault(layer.module.split(".")[2], [0, 0])
        counts[0] += layer.zeros_asked
        counts[1] += layer.shape[0] * layer.shape[1]
    return [round(zeros / weights, 4) for zeros, weights in asked.values()]


def measured(run: RunRecord) -> dict[str, Any]:
    assert run.capabilities is not None and run.perplexity is not None
    kept = {entry.capability: entry.retention for entry in run.capabilities.capabilities}
    return {
        "retention": kept | {"total": run.capabilities.total},
        "perplexity": run.perplexity.sparse,
        "zeros_asked": sum(layer.zeros_asked for layer in run.prune.layers),
        "by_block": by_block(run),
    }


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and OWL less uniform seed by seed."""
    uniform, owl = ([run for run in runs if run["allocation"] == name] for name in ALLOCATIONS)
    assert all(a["zeros_asked"] == b["zeros_asked"] for a, b in zip(uniform, owl, strict=True))
    found = {}
    for name in (*CAPABILITIES, "total", "perplexity"):
        of = [[run["retention"].get(name, run["perplexity"]) for run in several] for several in (uniform, owl)]
        differences = np.subtract(of[1], of[0])
        found[name] = {
            "uniform": float(np.mean(of[0])),
            "owl": float(np.mean(of[1])),
            "differences": differences.tolist(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", choices=MIXES, default=MIXES[0])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    dense: Scores = pruner(given.mix).evaluate()
    runs: dict[str, list[dict[str, Any]]] = {sparsity: [] for sparsity in SPARSITIES}
    for sparsity in SPARSITIES:
        for seed in range(given.seeds):
            for allocation in ALLOCATIONS:
                run = pruner(given.mix, sparsity, allocation, seed).prune(dense_scores=dense)
                runs[sparsity].append({"allocation": allocation, "seed": seed} | measured(run))
                print(sparsity, runs[sparsity][-1], flush=True)
    result = {
        "seeds": given.seeds,
        "compared": {sparsity: compared(several) for sparsity, several in runs.items()},
        "runs": runs,
        "cpu_seconds": time.process_time(),
        "versions": machine.versions(),
        "hardware": machine.hardware(torch.device("cpu")),
    }
    print(json.dumps(result["compared"], indent=1))
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(kept | {given.mix: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
