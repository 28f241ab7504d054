# SPDX-License-Identifier: Apache-2.0
"""How long IGSP's selection takes, and how much memory: 128 of 20,000 candidates of 2048 tokens.

    python benchmarks/selection.py [--candidates 20000] [--length 2048] [--samples 128]

The pool is made up on the spot: Zipf-distributed tokens, phrases that many candidates share, near-duplicates, loops. The
selection runs in a process of its own, whose largest resident size is read at the end; the pool is part of it. Writes
`benchmarks/results/selection.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from optimum_calibprune import machine
from optimum_calibprune.calibration.perplexity_balance import Imbalance, Level
from optimum_calibprune.calibration.select import select
from optimum_calibprune.records import CAPABILITIES


RESULT = Path(__file__).parent / "results" / "selection.json"
VOCABULARY, PHRASES, PHRASE = 32_000, 50_000, 16
TERMS = {"level": (Level, 3.0), "imbalance": (Imbalance, 0.1)}
BAR = {"seconds": 120, "bytes": 6e9}


def pool(candidates: int, length: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids `[candidates, length]`, groups and log-perplexities."""
    generator = np.random.default_rng(0)
    ids = (generator.zipf(1.2, (candidates, length)) % VOCABULARY).astype(np.int32)
    phrases = (generator.zipf(1.2, (PHRASES, PHRASE)) % VOCABULARY).astype(np.int32)
    which = generator.zipf(1.3, (candidates, length // PHRASE)) % PHRASES  # half of the text is phrases
    for row, numbers in zip(ids, which, strict=True):
        for place in range(0, length // PHRASE, 2):
            row[place * PHRASE : (place + 1) * PHRASE] = phrases[numbers[place]]
    for i in range(0, candidates, 20):  # one in twenty is another one with a tenth of its tokens changed
        ids[i] = ids[(7 * i + 1) % candidates]
        changed = generator.integers(0, length, length // 10)
        ids[i, changed] = generator.integers(0, VOCABULARY, len(changed))
    for i in range(3, candidates, 50):  # one in fifty loops
        ids[i] = np.resize(ids[i, : int(generator.integers(3, 30))], length)
    groups = [CAPABILITIES[i % len(CAPABILITIES)] for i in range(candidates)]
    return ids, groups, generator.normal(2.5, 0.6, candidates)


def measure(term: str, candidates: int, length: int, samples: int) -> dict[str, float]:
    ids, groups, nll = pool(candidates, length)
    quota = dict.fromkeys(CAPABILITIES, samples // len(CAPABILITIES))
    kind, weight = TERMS[term]
    started = time.perf_counter()
    found = select(ids, groups, nll, quota, balance_weight=weight, balance=kind)
    seconds = time.perf_counter() - started
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": largest, "pool_bytes": ids.nbytes, "steps": len(found.trace), **found.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--term", choices=TERMS, help=argparse.SUPPRESS)  # the process that measures
    given = parser.parse_args()
    sizes = (given.candidates, given.length, given.samples)
    if given.term:
        print(json.dumps(measure(given.term, *sizes)))
        return
    results = {}
    for term in TERMS:
        words = [sys.executable, __file__, "--term", term]
        words += ["--candidates", str(sizes[0]), "--length", str(sizes[1]), "--samples", str(sizes[2])]
        results[term] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        found = results[term]
        met = all(found[name] <= limit for name, limit in BAR.items())
        print(f"{term}: {found['seconds']:.0f} s, {found['bytes'] / 1e9:.1f} GB, bar {'met' if met else 'missed'}")
    import torch

    made = {"candidates": sizes[0], "length": sizes[1], "samples": sizes[2], "bar": BAR, "terms": results}
    made |= {"versions": machine.versions(), "hardware": machine.hardware(torch.device("cpu"))}
    RESULT.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
