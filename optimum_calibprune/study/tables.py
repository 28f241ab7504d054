# SPDX-License-Identifier: Apache-2.0
"""What a study found, as one plain dictionary from which the files, the figures and the report are made."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..capabilities.retention import capability_report, draws_report
from ..records import CAPABILITIES, MixRule, Scores
from .cells import NAMED, SINGLE, WRITTEN, CellResult, Measured
from .statistics import Correlation, Resampler, Totals, compare, correlation
from .store import StudySettings


TOTAL, PERPLEXITY, BEST_SINGLE = "total", "perplexity", "best single"
COMPARED = (  # kinds of mix, or a single source
    ("igsp", "self-cal"),
    ("igsp", "sgs"),
    ("igsp", "uniform"),
    ("igsp", "cola"),
    ("igsp", "balanced"),
    ("igsp", "mixcal"),
    ("igsp", BEST_SINGLE),
    ("igsp", "single:c4"),
    ("uniform", BEST_SINGLE),
    ("uniform", "single:c4"),
)
Row = dict[str, Any]


class _Group:
    """All draws of one mix at one pattern, by seed."""

    def __init__(self, label: str, results: Sequence[CellResult]) -> None:
        self.label = label
        self.results = sorted(results, key=lambda result: result.cell.seed)
        self.rule, self.pattern = results[0].cell.mix, results[0].cell.pattern
        self.sources = results[0].cell.sources
        self.seeds = tuple(result.cell.seed for result in self.results)
        self.draws = [result.sparse.scores() for result in self.results]
        self.upper_bound = sorted({name for result in results for name in result.upper_bound})
        self.total: float | None = None

    def draws_of(self, seeds: Sequence[int]) -> list[Scores]:
        return [draw for seed, draw in zip(self.seeds, self.draws, strict=True) if seed in seeds]


def summarise(settings: StudySettings, dense: Measured, results: Sequence[CellResult]) -> dict[str, Any]:
    """Settings, dense scores, one row a cell, one a mix and pattern, correlations, comparisons, and what failed."""
    good = [result for result in results if not result.failed]
    scores = dense.scores()
    defined = capability_report(scores, scores).measured
    groups = _groups(good)
    labels = {id(result): group.label for group in groups for result in group.results}
    mixes = [_mix_row(group, scores) for group in groups]
    return {
        "settings": settings.to_dict(),
        "hardware": _distinct(result.hardware for result in good),
        "dense": _dense_row(dense, scores, defined),
        "mixes": mixes,
        "correlations": list(_correlations(groups, mixes, defined)),
        "comparisons": list(_comparisons(groups, Resampler(scores, defined))),
        "cells": [_cell_row(result, labels[id(result)], scores, defined) for result in good],
        "failed": [{"cell": str(result.cell), "why": result.failed} for result in results if result.failed],
    }


# ------------------------------------------------------------------------------------------------- rows


def _groups(results: Sequence[CellResult]) -> list[_Group]:
    """Draws that differ by their seed alone, by pattern and mix."""
    found: dict[tuple[str, tuple[str, ...], str], list[CellResult]] = {}
    for result in results:
        cell = result.cell
        found.setdefault((str(cell.mix), tuple(sorted(cell.sources)), str(cell.pattern)), []).append(result)
    most = max((len(sources) for _, sources, _ in found), default=0)
    groups = [
        _Group(_label(MixRule.parse(mix), sources, most), members)
        for (mix, sources, _), members in sorted(found.items())
    ]
    return sorted(groups, key=lambda group: (group.pattern.fraction, str(group.pattern)))


def _label(rule: MixRule, sources: tuple[str, ...], most: int) -> str:
    """The mix; with its sources where they are not the usual ones: all of the study, or none where the model writes."""
    usual = rule.kind in NAMED or len(sources) == (0 if rule.kind in WRITTEN else most)
    return str(rule) if usual else f"{rule}@{','.join(sources)}"


def _mix_row(group: _Group, dense: Scores) -> Row:
    report = draws_report(dense, group.draws)
    group.total = report.total
    perplexities = [result.sparse.perplexity for result in group.results if result.sparse.perplexity is not None]
    return {
        "mix": group.label,
        "kind": group.rule.kind,
        "capability": group.results[0].capabilities.get(group.sources[0], "") if group.rule.kind == SINGLE else "",
        "sources": list(group.sources),
        "pattern": str(group.pattern),
        "fraction": None if group.pattern.n else group.pattern.fraction,
        "seeds": list(group.seeds),
        "upper_bound": group.upper_bound,
        "retention": {
            entry.capability: {"value": entry.retention, "interval": _pair(entry.interval), "sparse": entry.sparse}
            for entry in report.capabilities
        },
        "total": report.total,
        "total_interval": _pair(report.total_interval),
        "worst": report.worst,
        "perplexity": _spread(perplexities) if len(perplexities) == len(group.results) else None,
        "metrics": _average([result.metrics for result in group.results]),
        "seconds": math.fsum(result.seconds["all"] for result in group.results) / len(group.results),
    }


def _cell_row(result: CellResult, label: str, dense: Scores, defined: Sequence[str]) -> Row:
    kept = {name: _score(result.sparse.scores(), name) / _score(dense, name) for name in defined}
    return {
        "mix": label,
        "pattern": str(result.cell.pattern),
        "seed": result.cell.seed,
        "upper_bound": list(result.upper_bound),
        "retention": kept,
        "total": math.fsum(kept.values()) / len(kept) if kept else None,
        "perplexity": result.sparse.perplexity,
        "metrics": result.metrics,
        "shares": result.shares,
        "zeros": result.zeros,
        "fingerprint": result.fingerprint,
        "seconds": result.seconds,
    }


def _dense_row(dense: Measured, scores: Scores, defined: Sequence[str]) -> Row:
    return {
        "scores": {
            name: {
                "value": _score(scores, name),
                "items": sum(len(task.item_scores) for task in scores.tasks if task.capability == name),
                "chance": next(task.chance for task in scores.tasks if task.capability == name),
                "above_chance": name in defined,
            }
            for name in dense.capabilities
        },
        "not_measured": dense.not_measured,
        "perplexity": dense.perplexity,
        "text": dense.text,
    }


def _score(scores: Scores, capability: str) -> float:
    """The mean over the capability's tasks."""
    values = [task.value for task in scores.tasks if task.capability == capability]
    return math.fsum(values) / len(values)


def _average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: _mean(name, [row[name] for row in rows]) for name in names}


def _mean(name: str, values: Sequence[float]) -> float:
    """The arithmetic mean; of a perplexity the geometric one."""
    if name == PERPLEXITY:
        return math.exp(math.fsum(map(math.log, values)) / len(values))
    return math.fsum(values) / len(values)


def _spread(perplexities: Sequence[float]) -> dict[str, float]:
    return {"mean": _mean(PERPLEXITY, perplexities), "lowest": min(perplexities), "highest": max(perplexities)}


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _distinct(rows: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    return [dict(found) for found in sorted({tuple(row.items()) for row in rows})]


# ------------------------------------------------------------------------------------------- correlations


def _correlations(groups: Sequence[_Group], mixes: Sequence[Row], defined: Sequence[str]) -> Iterator[Row]:
    """Each metric of a single source with what each capability keeps, at each pattern; text from the generator of the
    probes is left out. Metrics that are the same for all sources say nothing and are left out, too."""
    for pattern in dict.fromkeys(str(group.pattern) for group in groups):
        rows = [row for row in mixes if row["pattern"] == pattern and row["kind"] == SINGLE and not row["upper_bound"]]
        outcomes: dict[str, list[float]] = {
            name: [row["retention"][name]["value"] for row in rows] for name in defined
        }
        if defined:
            outcomes[TOTAL] = [row["total"] for row in rows]
        if rows and all(row["perplexity"] for row in rows):
            outcomes[PERPLEXITY] = [row["perplexity"]["mean"] for row in rows]
        names = [name for name in rows[0]["metrics"] if all(name in row["metrics"] for row in rows)] if rows else []
        for metric in names:
            values = [row["metrics"][metric] for row in rows]
            if len(set(values)) == 1:
                continue
            for outcome, kept in outcomes.items():
                found: Correlation = correlation(values, kept)
                yield {"pattern": pattern, "metric": metric, "outcome": outcome} | found.to_dict()


# -------------------------------------------------------------------------------------------- comparisons


def _comparisons(groups: Sequence[_Group], resampler: Resampler) -> Iterator[Row]:
    """Every pair that `COMPARED` names and that has seeds in common, at each pattern."""
    totals: dict[tuple[str, str, tuple[int, ...]], Totals] = {}

    def of(group: _Group, seeds: tuple[int, ...]) -> Totals:
        key = (group.label, str(group.pattern), seeds)
        if key not in totals:
            totals[key] = resampler.totals(group.draws_of(seeds))
        return totals[key]

    for pattern in dict.fromkeys(str(group.pattern) for group in groups):
        here = [group for group in groups if str(group.pattern) == pattern and not group.upper_bound]
        for first, second in COMPARED:
            for a in _named(first, here):
                for b in _named(second, here):
                    seeds = tuple(seed for seed in a.seeds if seed in b.seeds)
                    if seeds and resampler.capabilities:
                        found = compare(a.label, b.label, pattern, seeds, of(a, seeds), of(b, seeds))
                        yield found.to_dict() | {"as": second}


def _named(name: str, groups: Sequence[_Group]) -> list[_Group]:
    """The groups that a name of `COMPARED` means."""
    if name == BEST_SINGLE:
        singles = [group for group in groups if group.rule.kind == SINGLE and group.total is not None]
        return [max(singles, key=lambda group: group.total or 0.0)] if len(singles) > 1 else []
    return [group for group in groups if name in (group.rule.kind, str(group.rule))]


# ---------------------------------------------------------------------------------------------------- csv


def cells_csv(data: Mapping[str, Any]) -> str:
    """One line a cell: what it is, what was kept, what its calibration set is like, how long it took."""
    kept = [name for name in CAPABILITIES if name in data["dense"]["scores"]]
    metrics = list(dict.fromkeys(name for row in data["cells"] for name in row["metrics"]))
    header = [
        "mix",
        "pattern",
        "seed",
        *kept,
        TOTAL,
        "sparse_perplexity",
        *metrics,
        "upper_bound",
        "fingerprint",
        "seconds",
    ]
    lines = [
        [
            *(row["mix"], row["pattern"], row["seed"]),
            *(row["retention"].get(name) for name in kept),
            *(row["total"], row["perplexity"]),
            *(row["metrics"].get(name) for name in metrics),
            *(" ".join(row["upper_bound"]), row["fingerprint"], row["seconds"]["all"]),
        ]
        for row in data["cells"]
    ]
    return _csv([header, *lines])


def mixes_csv(data: Mapping[str, Any]) -> str:
    """One line a mix and pattern: the mean over its draws and the two-level interval of everything that was kept."""
    kept = [name for name in CAPABILITIES if name in data["dense"]["scores"]]
    parts = [f"{name}{suffix}" for name in (*kept, TOTAL) for suffix in ("", "_low", "_high")]
    header = ["mix", "pattern", "seeds", *parts, "sparse_perplexity", "upper_bound"]
    lines = []
    for row in data["mixes"]:
        found = [row["retention"].get(name, {"value": None, "interval": None}) for name in kept]
        found.append({"value": row["total"], "interval": row["total_interval"]})
        values = [value for entry in found for value in (entry["value"], *(entry["interval"] or (None, None)))]
        perplexity = row["perplexity"]["mean"] if row["perplexity"] else None
        lines.append(
            [row["mix"], row["pattern"], len(row["seeds"]), *values, perplexity, " ".join(row["upper_bound"])]
        )
    return _csv([header, *lines])


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
