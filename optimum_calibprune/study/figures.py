# SPDX-License-Identifier: Apache-2.0
"""Which figures a study has: the numbers of its summary, handed to `publishing/plots.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..publishing import plots
from ..records import CAPABILITIES
from .cells import SINGLE
from .tables import PERPLEXITY, TOTAL


Summary = Mapping[str, Any]
WORDS = {  # the names of fields, as a reader knows them
    "perplexity": "perplexity",
    "duplicate_rate": "4-gram duplicates",
    "collision_probability": "4-gram collisions",
    "type_token_ratio": "type-token ratio",
    "unigram_entropy": "unigram entropy",
    "compression_ratio": "compression ratio",
    "model_entropy": "entropy under the model",
}
UPPER_BOUND = "† upper bound: text from the generator of the probes"


def words(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))


def label(row: Mapping[str, Any]) -> str:
    """A mix as tables and figures call it; a dagger marks text from the generator of the probes."""
    return f"{short(row['mix'])} †" if row["upper_bound"] else short(row["mix"])


def short(mix: str) -> str:
    """ "single:c4" -> "c4"; "uniform@a,b,c" -> "uniform of a + 2 more"."""
    name, _, drawn = mix.removeprefix("single:").partition("@")
    first, *others = drawn.split(",")
    more = f" + {len(others)} more" if others else ""
    return f"{name} of {first}{more}" if drawn else name


def patterns(data: Summary) -> list[str]:
    return list(dict.fromkeys(row["pattern"] for row in data["mixes"]))


def draw(data: Summary, folder: Path) -> list[tuple[str, str]]:
    """Draws every figure that the numbers allow; (file name, what it shows) of each."""
    return [(path.name, caption) for path, caption in _figures(data, folder)]


def _figures(data: Summary, folder: Path) -> Iterator[tuple[Path, str]]:
    several = len(patterns(data)) > 1
    for pattern in patterns(data):
        rows = [row for row in data["mixes"] if row["pattern"] == pattern]
        name = pattern.replace("%", "").replace(":", "of") if several else ""
        ending = f"-{name}.png" if name else ".png"
        note = UPPER_BOUND if any(row["upper_bound"] for row in rows) else ""
        if any(row["total"] is not None for row in rows):
            yield _heat_map(rows, pattern, note, folder / f"retention{ending}")
            yield _totals(rows, pattern, note, folder / f"totals{ending}")
        if all(row["perplexity"] for row in rows):
            yield _perplexities(rows, data["dense"], pattern, note, folder / f"perplexity{ending}")
        found = [row for row in data["correlations"] if row["pattern"] == pattern]
        if any(row["rho"] is not None for row in found):
            yield _correlations(found, pattern, folder / f"correlations{ending}")
    curve = _curves(data, folder / "sparsity.png")
    if curve is not None:
        yield curve


def _heat_map(rows: Sequence[Summary], pattern: str, note: str, path: Path) -> tuple[Path, str]:
    columns = [name for name in CAPABILITIES if any(name in row["retention"] for row in rows)]
    ordered = sorted(rows, key=lambda row: -(row["total"] or 0.0))
    groups: list[tuple[str, list[tuple[str, list[float | None]]]]] = []
    for heading in (*CAPABILITIES, "mixes"):
        members = [row for row in ordered if (row["capability"] or "mixes") == heading]
        values = [[*(row["retention"].get(c, {}).get("value") for c in columns), row["total"]] for row in members]
        if members:
            groups.append(
                (
                    heading if heading == "mixes" else f"{heading} sources",
                    list(zip(map(label, members), values, strict=True)),
                )
            )
    title = f"Retention at {pattern} by calibration text, per cent"
    return (
        plots.heat_map(path, title, [*columns, TOTAL], groups, note),
        f"Retention at {pattern}: calibration text by capability, means over draws.",
    )


def _totals(rows: Sequence[Summary], pattern: str, note: str, path: Path) -> tuple[Path, str]:
    ordered = sorted((row for row in rows if row["total"] is not None), key=lambda row: -row["total"])
    points = [
        plots.Point(
            *(label(row), row["total"], row["total_interval"]),
            strong=row["kind"] != SINGLE and not row["upper_bound"],
            hollow=bool(row["upper_bound"]),
        )
        for row in ordered
    ]
    over = ", ".join(name for name in CAPABILITIES if name in rows[0]["retention"])
    parts = [f"Mean over {over}; 95 % intervals over draws and items. Blue: mixes, grey: single sources.", note]
    return (
        plots.intervals(path, f"Total retention at {pattern}", "per cent", points, " ".join(filter(None, parts))),
        f"Total retention at {pattern} by calibration text, with 95 % intervals over draws and items.",
    )


def _perplexities(rows: Sequence[Summary], dense: Summary, pattern: str, note: str, path: Path) -> tuple[Path, str]:
    ordered = sorted(rows, key=lambda row: row["perplexity"]["mean"])
    points = [
        plots.Point(
            *(label(row), row["perplexity"]["mean"], (row["perplexity"]["lowest"], row["perplexity"]["highest"])),
            strong=row["kind"] != SINGLE and not row["upper_bound"],
            hollow=bool(row["upper_bound"]),
        )
        for row in ordered
    ]
    known = f"Dense: {dense['perplexity']:.2f}. " if dense["perplexity"] else ""
    text = f"{known}Lines: lowest to highest draw. Blue: mixes, grey: single sources. {note}".strip()
    return (
        plots.intervals(path, f"Perplexity on {dense['text']} at {pattern}", "perplexity", points, text, share=False),
        f"Perplexity of the sparse model on {dense['text']} at {pattern}, from the lowest to the highest draw.",
    )


def _correlations(found: Sequence[Summary], pattern: str, path: Path) -> tuple[Path, str]:
    metrics = list(dict.fromkeys(row["metric"] for row in found))
    outcomes = list(dict.fromkeys(row["outcome"] for row in found))
    by_pair = {(row["metric"], row["outcome"]): row for row in found}
    panels = {
        "sparse perplexity" if outcome == PERPLEXITY else outcome: [
            (by_pair[m, outcome]["rho"], by_pair[m, outcome]["interval"], by_pair[m, outcome]["p_value"])
            for m in metrics
        ]
        for outcome in outcomes
    }
    points = found[0]["points"]
    what = "retention" if TOTAL in outcomes else "perplexity"
    return (
        plots.correlations(
            *(path, f"What goes with {what} at {pattern}, over {points} single sources"),
            *([words(metric) for metric in metrics], panels),
            note="Lines: 95 % bootstrap intervals over sources. Filled: permutation p < 0.05, not corrected for their number.",
        ),
        f"Spearman's rho of each metric of the calibration text with each outcome at {pattern}, over {points} single sources.",
    )


def _curves(data: Summary, path: Path) -> tuple[Path, str] | None:
    """Total retention against sparsity, and beside it the margins over C4; None where one sparsity is all there is."""
    totals: dict[str, list[tuple[float, float, Any]]] = {}
    fractions = {row["pattern"]: row["fraction"] for row in data["mixes"]}
    for row in data["mixes"]:
        if row["fraction"] is not None and row["total"] is not None:
            totals.setdefault(label(row), []).append((row["fraction"], row["total"], row["total_interval"]))
    shown = _most_telling(data)
    totals = {name: points for name, points in totals.items() if len(points) > 1 and name in shown}
    margins: dict[str, list[tuple[float, float, Any]]] = {}
    for row in data["comparisons"]:
        if row["second"] == "single:c4" and fractions[row["pattern"]] is not None:
            point = (fractions[row["pattern"]], row["difference"], row["interval"])
            margins.setdefault(short(row["first"]), []).append(point)
    margins = {name: points for name, points in margins.items() if len(points) > 1 and name in shown}
    if not totals:
        return None
    panels: list[tuple[str, Mapping[str, Any]]] = [("Total retention, per cent", totals)]
    if margins:
        panels.append(("Total retention minus that of c4, points", margins))
    caption = "Total retention against sparsity" + (", and the margin over C4" if margins else "")
    return (
        plots.curves(path, caption, "sparsity, per cent", panels, "Lines: 95 % intervals over draws and items."),
        f"{caption}, with 95 % intervals over draws and items.",
    )


def _most_telling(data: Summary) -> set[str]:
    """The mixes that a figure of curves can hold: those of the comparisons first, then the others by total retention."""
    names = [row["first"] for row in data["comparisons"]]
    names += [row["second"] for row in data["comparisons"] if row["second"].startswith("single:c4")]
    names += [row["second"] for row in data["comparisons"]]
    names += [row["mix"] for row in sorted(data["mixes"], key=lambda row: -(row["total"] or 0.0))]
    most = {name: sum(row["mix"] == name for row in data["mixes"]) for name in names}
    ordered = [name for name in dict.fromkeys(names) if most[name] > 1]
    return {label(row) for row in data["mixes"] if row["mix"] in ordered[: len(plots.LINES)]}
