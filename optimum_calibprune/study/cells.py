# SPDX-License-Identifier: Apache-2.0
"""What a study runs: mixes x patterns x seeds on one model, and what is kept of each cell."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..records import (
    CAPABILITIES,
    CalibrationSource,
    MixRule,
    Record,
    Scores,
    SparsityPattern,
    TaskScore,
    require,
    unknown,
)
from ..values import MIXES, SELF


SINGLE, ALL = "single", "all"
NAMED = ("single", "weighted")  # kinds of mix that name their sources
WRITTEN = ("self-cal", "sgs", "igsp")  # kinds that need no source, since the model writes


# ------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Cell(Record):
    """One run of the study: a mix, the names of the sources that it is given (none: what the mix takes by itself), a
    pattern, a seed."""

    mix: MixRule
    sources: tuple[str, ...]
    pattern: SparsityPattern
    seed: int

    @property
    def key(self) -> str:
        """The name of the cell's file: readable, and different for different cells."""
        parts = (str(self.mix), *sorted(self.sources), str(self.pattern), self.seed)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.mix} {self.pattern}".replace("%", "pct"))[:80]
        return f"{readable}-seed{self.seed}-{digest}"

    def __str__(self) -> str:
        return f"{self.mix} at {self.pattern}, seed {self.seed}"


def grid(
    mixes: Sequence[str],
    sources: Sequence[CalibrationSource],
    patterns: Sequence[str | float | SparsityPattern],
    seeds: Sequence[int],
) -> list[Cell]:
    """Every mix with every pattern and every seed; all mixes of one seed before the next seed, so that a study that is
    stopped early has complete rows.

    `mixes` are texts as in `CalibPruneConfig.mix`, `"single"` for each source alone, `"all"` for those and one of each other
    kind. Every mix draws from all sources, but those that the model writes itself, which are given none. `"MIX@NAME,NAME"`
    gives a mix these sources and no others (`"igsp@self,c4"` with the model among them), `"MIX@all"` all of them. Texts
    from the generator of the probes (`upper_bound`) are used only where they are named.

    Raises `ValueError` for anything that no mix can be.
    """
    require(bool(sources), "A study needs at least one source.")
    require(bool(seeds), "A study needs at least one seed.")
    require(bool(patterns), "A study needs at least one sparsity.")
    require(min(seeds) >= 0, f"Seeds must not be negative; {min(seeds)} was given.")
    names = [source.name for source in sources]
    usual = tuple(source.name for source in sources if not source.upper_bound) or tuple(names)
    chosen: dict[tuple[MixRule, tuple[str, ...]], None] = {}  # in the order given, each once
    for text in mixes or [ALL]:
        for rule, drawn in _mixes(text, usual):
            for name in (*drawn, *(name for name, _ in rule.weights)):
                if name not in names and not (name == SELF and rule.kind == "igsp"):
                    raise unknown("source of the mix", name, names)
            chosen[rule, tuple(sorted(drawn))] = None
    parsed = [SparsityPattern.parse(pattern) for pattern in patterns]
    return [Cell(rule, drawn, pattern, seed) for seed in seeds for pattern in parsed for rule, drawn in chosen]


def _mixes(text: str, usual: tuple[str, ...]) -> list[tuple[MixRule, tuple[str, ...]]]:
    """One of the given texts -> rules, each with the sources it may draw from."""
    singles = [(MixRule(SINGLE, ((name, 1.0),)), (name,)) for name in usual]
    if text == SINGLE:
        return singles
    if text == ALL:
        kinds = [MixRule(kind) for kind in MIXES if kind not in NAMED]
        return singles + [(rule, () if rule.kind in WRITTEN else usual) for rule in kinds]
    mix, at, named = text.partition("@")
    rule = MixRule.parse(mix)
    if not at:
        return [(rule, () if rule.kind in WRITTEN else tuple(name for name, _ in rule.weights) or usual)]
    require(rule.kind not in NAMED, f"{text!r}: the mix {rule.kind!r} names its sources already; leave out '@...'.")
    require(rule.kind != "self-cal", f"{text!r}: the model alone writes this mix; leave out '@...'.")
    drawn = usual if named == ALL else tuple(part.strip() for part in named.split(",") if part.strip())
    require(bool(drawn), f"{text!r} names no source after '@'; allowed: '{mix}@NAME,OTHER' or '{mix}@all'.")
    return [(rule, drawn)]


# ------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class TaskItems(Record):
    """A `TaskScore` as it is stored: `items` is one character a item where all scores are 0 or 1, else `values` holds them."""

    task: str
    capability: str
    metric: str
    chance: float
    items: str = ""
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, score: TaskScore) -> TaskItems:
        binary = all(value in (0, 1) for value in score.item_scores)
        items = "".join(str(int(value)) for value in score.item_scores) if binary else ""
        values = () if binary else score.item_scores
        return cls(score.task, score.capability, score.metric, score.chance, items, values)

    def score(self) -> TaskScore:
        items = tuple(float(character) for character in self.items) if self.items else self.values
        return TaskScore(self.task, self.capability, self.metric, self.chance, items)


@dataclass(frozen=True)
class Measured(Record):
    """What was measured of one model, dense or sparse: every item of every task, and the perplexity of the text that is
    named, if there is one. `not_measured` names what could not be measured, with the reason."""

    tasks: tuple[TaskItems, ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict)
    perplexity: float | None = None
    text: str = ""

    def scores(self) -> Scores:
        return Scores(tuple(task.score() for task in self.tasks), self.not_measured)

    @property
    def capabilities(self) -> tuple[str, ...]:
        found = {task.capability for task in self.tasks}
        return tuple(name for name in CAPABILITIES if name in found)


@dataclass(frozen=True)
class CellResult(Record):
    """A cell that has run. `failed` is the sentence of its error; then nothing else is known.

    `metrics` holds the numeric fields of the profile of the calibration set as a whole, `sample_means` the means of those of
    its samples (of perplexity the geometric mean), `source_metrics` those of each source it was chosen from, and `capabilities`
    what each of these sources stands for. `shares` says how much came from where; `upper_bound` names those of its sources
    that come from the generator of the probes.
    """

    cell: Cell
    failed: str = ""
    sparse: Measured = Measured()
    metrics: dict[str, float] = field(default_factory=dict)
    sample_means: dict[str, float] = field(default_factory=dict)
    source_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    capabilities: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    upper_bound: tuple[str, ...] = ()
    fingerprint: str = ""
    zeros: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
