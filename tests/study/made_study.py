# SPDX-License-Identifier: Apache-2.0
"""A study made up without a model: its cells answer questions as often as a rule says."""

from __future__ import annotations

import math
import zlib

import numpy as np

from optimum_calibprune.records import CAPABILITIES, MixRule, SparsityPattern
from optimum_calibprune.study.cells import WRITTEN, Cell, CellResult, Measured, TaskItems
from optimum_calibprune.study.store import StudySettings


SOURCES = {
    "c4": ("general", 36.0),
    "openwebtext": ("general", 38.0),
    "wikitext2": ("general", 16.0),
    "textbooks": ("general", 19.0),
    "dolly": ("general", 20.0),
    "arc": ("general", 13.0),
    "piqa": ("commonsense", 21.0),
    "winogrande": ("commonsense", 14.0),
    "commonsense_qa": ("commonsense", 13.5),
    "thealgorithms": ("code", 8.0),
    "codegen_instruct": ("code", 4.0),
    "mbpp": ("code", 6.0),
    "gsm8k": ("math", 7.0),
    "algebra_textbook": ("math", 9.0),
    "mathematics": ("math", 4.5),
}
KEEPS = {"general": 0.8, "commonsense": 0.75, "code": 0.45, "math": 0.25}  # at 50 %, from text of another capability


def settings() -> StudySettings:
    return StudySettings(
        model="pocket",
        revision=None,
        weights="ab" * 32,
        options={"samples": "64", "length": "256", "method": "sparsegpt"},
        capabilities=CAPABILITIES,
        probes={f"pocket_{name}": "cd" * 32 for name in CAPABILITIES},
        perplexity_text="",
        seed_texts="",
        versions={"torch": "2.13.0", "optimum-calibprune": "0.1.0"},
        sources=dict.fromkeys(SOURCES, "ef" * 32),
    )


def dense(items: int = 100, text: str = "") -> Measured:
    return _measured({"general": 0.98, "commonsense": 0.95, "code": 0.9, "math": 0.85}, items, 0, text)


def result(mix: str, pattern: str = "50%", seed: int = 0, items: int = 100, text: str = "") -> CellResult:
    """A cell that keeps most of its own capability, and of the others the less, the more is pruned."""
    rule = MixRule.parse(mix)
    names = tuple(name for name, _ in rule.weights) or (() if rule.kind in WRITTEN else tuple(SOURCES))
    fraction = SparsityPattern.parse(pattern).fraction
    kept = {}
    generator = np.random.default_rng([seed, zlib.crc32(mix.encode())])
    for capability, base in KEEPS.items():
        own = 0.25 if rule.kind == "single" and SOURCES[names[0]][0] == capability else 0.0
        bonus = {"uniform": 0.12, "igsp": 0.2, "self-cal": 0.17, "sgs": 0.14}.get(rule.kind, 0.0) + own
        noise = 0.02 * generator.standard_normal()
        kept[capability] = float(np.clip(1 - (1 - min(0.99, base + bonus)) * (fraction / 0.5) ** 2 + noise, 0, 1))
    perplexity = math.exp(
        np.mean([math.log(SOURCES[name][1]) for name in names or ("mbpp",)]) + 0.02 * generator.standard_normal()
    )
    return CellResult(
        cell=Cell(rule, names, SparsityPattern.parse(pattern), seed),
        sparse=_measured({name: share * 0.95 for name, share in kept.items()}, items, seed + 1, text),
        metrics={
            "perplexity": perplexity,
            "duplicate_rate": 1 / perplexity,
            "compression_ratio": 2 + generator.random(),
        },
        capabilities={name: SOURCES[name][0] for name in names},
        shares={name: 1 / len(names) for name in names},
        fingerprint="01" * 32,
        zeros=fraction,
        seconds={"all": 12.5, "prune": 4.0},
        hardware={"cores": "2", "threads": "1"},
    )


def _measured(shares: dict[str, float], items: int, seed: int, text: str) -> Measured:
    generator = np.random.default_rng(seed)
    tasks = tuple(
        TaskItems(
            f"pocket_{name}",
            name,
            "exact_match",
            0.25 if name in ("general", "commonsense") else 0.0,
            "".join(str(int(draw < share)) for draw in generator.random(items)),
        )
        for name, share in shares.items()
    )
    perplexity = 8.0 + 10 * (1 - shares["general"]) + seed / 10 if text else None
    return Measured(tasks, {}, perplexity, text)
