# SPDX-License-Identifier: Apache-2.0
"""A study's folder in, its tables, figures and report out; every number of the report stands in retention.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..publishing import plots
from ..records import CAPABILITIES
from . import figures
from .figures import label, short, words
from .store import StudyFolder, StudySettings, write_whole
from .tables import BEST_SINGLE, PERPLEXITY, TOTAL, cells_csv, mixes_csv, summarise


JSON_NAME, REPORT_NAME, FIGURES_FOLDER = "retention.json", "report.md", "figures"
SHOWN = ("perplexity", "duplicate_rate")  # metrics of the calibration set that stand in the table of mixes
Summary = Mapping[str, Any]


def write_report(folder: StudyFolder, settings: StudySettings) -> dict[str, Any]:
    """Writes retention.json, retention.csv (cells), mixes.csv, report.md, and figures where matplotlib is there.

    Covers every finished cell that lies in the folder, whichever command ran it. Returns the content of retention.json.
    Raises `ValueError` where the dense model has not been measured yet.
    """
    dense = folder.dense()
    if dense is None:
        raise ValueError(f"{folder.path} has no dense scores yet; run the study first.")
    data = summarise(settings, dense, folder.results(dense))
    drawn = figures.draw(data, folder.path / FIGURES_FOLDER) if plots.available() else []
    write_whole(folder.path / JSON_NAME, json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_whole(folder.path / "retention.csv", cells_csv(data))
    write_whole(folder.path / "mixes.csv", mixes_csv(data))
    write_whole(folder.path / REPORT_NAME, render(data, drawn))
    return data


def render(data: Summary, drawn: Sequence[tuple[str, str]] = ()) -> str:
    """The report as Markdown; `drawn` are (file name, caption) of the figures."""
    parts = [f"# Calibration text and what {data['settings']['model']} keeps", _opening(data)]
    for pattern in figures.patterns(data):
        rows = [row for row in data["mixes"] if row["pattern"] == pattern]
        parts += [f"## At {pattern}", _mixes(rows, data["dense"])]
        if any(row["upper_bound"] for row in rows):
            parts.append(f"{figures.UPPER_BOUND}; it is no calibration that a user could have.")
    if data["comparisons"]:
        parts += ["## Differences of total retention", _comparisons(data["comparisons"]), COMPARISON_NOTE]
    if any(row["rho"] is not None for row in data["correlations"]):
        parts += ["## Metrics of the text and what is kept", _correlations(data["correlations"]), CORRELATION_NOTE]
    if drawn:
        parts.append("## Figures")
        parts += [f"![{caption}]({FIGURES_FOLDER}/{name})\n\n{caption}" for name, caption in drawn]
    if data["failed"]:
        parts += ["## Cells that failed", "\n".join(f"- {row['cell']}: {row['why']}" for row in data["failed"])]
    parts += ["## Made with", _made_with(data)]
    return "\n\n".join(parts) + "\n"


COMPARISON_NOTE = (
    "First minus second, in points of total retention, over the seeds that both have; 95 % intervals from a bootstrap over "
    "seeds and items that is the same for both. The best single source was chosen by these same numbers, which favours it."
)
CORRELATION_NOTE = (
    "Spearman's rho over the single sources, with a 95 % bootstrap interval over sources and a two-sided permutation p-value, "
    "which is not corrected for the number of pairs in the table."
)


def _opening(data: Summary) -> str:
    options, dense = data["settings"]["options"], data["dense"]
    cells = data["cells"]
    seeds = sorted({row["seed"] for row in cells})
    lines = [
        f"{len(cells)} cells: {len({row['mix'] for row in cells})} calibration texts, sparsity "
        f"{', '.join(figures.patterns(data)) or 'none'}, seeds {', '.join(map(str, seeds)) or 'none'}; "
        f"{options['samples']} x {options['length']} tokens, {options['method']}."
    ]
    for name, found in dense["scores"].items():
        chance = "" if found["above_chance"] else ", which is not above chance: its retention is undefined"
        lines.append(f"- dense {name}: {100 * found['value']:.1f} % of {found['items']} items{chance}")
    lines += [f"- {name}: not measured ({why})" for name, why in dense["not_measured"].items()]
    if dense["perplexity"] is not None:
        lines.append(f"- dense perplexity on {dense['text']}: {dense['perplexity']:.3f}")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _mixes(rows: Sequence[Summary], dense: Summary) -> str:
    """Sorted by what is best: total retention, or the sparse model's perplexity where no capability was measured."""
    kept = [name for name in CAPABILITIES if name in dense["scores"]]
    perplexity = any(row["perplexity"] for row in rows)
    header = ["calibration", "draws", *map(words, SHOWN), *kept]
    header += [TOTAL] * bool(kept) + [f"sparse perplexity on {dense['text']} (lowest to highest draw)"] * perplexity
    ordered = sorted(
        rows, key=lambda row: (-(row["total"] or 0), (row["perplexity"] or {}).get("mean", 0), row["mix"])
    )
    lines = []
    for row in ordered:
        metrics = row["metrics"]
        line = [label(row), str(len(row["seeds"]))]
        line += [f"{metrics[n]:.1f}" if n == PERPLEXITY else f"{100 * metrics[n]:.1f} %" for n in SHOWN]
        line += [_share(row["retention"][name]["value"], row["retention"][name]["interval"]) for name in kept]
        if kept:
            line.append(f"**{_share(row['total'], row['total_interval'])}**")
        if perplexity:
            found = row["perplexity"]
            line.append(f"{found['mean']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})" if found else "")
        lines.append(line)
    table = _table([header, *lines])
    if not kept:
        return table
    return table + (
        "\n\nRetention in per cent: mean over draws, with 95 % intervals over draws and items. The total is the mean over "
        f"{', '.join(name for name in kept if dense['scores'][name]['above_chance']) or 'nothing'}."
    )


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return "undefined"
    return f"{100 * value:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _comparisons(rows: Iterable[Summary]) -> str:
    lines = [["sparsity", "first", "second", "seeds", "difference"]]
    for row in rows:
        second = short(row["second"])
        second = f"{second} ({BEST_SINGLE})" if row["as"] == BEST_SINGLE else second
        low, high = row["interval"]
        found = f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        lines.append([row["pattern"], short(row["first"]), second, str(len(row["seeds"])), found])
    return _table(lines)


def _correlations(rows: Sequence[Summary]) -> str:
    outcomes = list(dict.fromkeys(row["outcome"] for row in rows))
    found = {(row["pattern"], row["metric"], row["outcome"]): row for row in rows}
    lines = [["sparsity", "metric", "sources", *(f"sparse {o}" if o == PERPLEXITY else o for o in outcomes)]]
    for pattern, metric, points in dict.fromkeys((row["pattern"], row["metric"], row["points"]) for row in rows):
        cells = [found.get((pattern, metric, outcome)) for outcome in outcomes]
        lines.append([pattern, words(metric), str(points), *map(_rho, cells)])
    return _table(lines)


def _rho(row: Summary | None) -> str:
    if row is None or row["rho"] is None:
        return "undefined"
    span = f" ({row['interval'][0]:+.2f} to {row['interval'][1]:+.2f})" if row["interval"] else ""
    p = f"p = {row['p_value']:.3f}" if row["p_value"] >= 0.001 else "p < 0.001"
    return f"{row['rho']:+.2f}{span}, {p}"


def _made_with(data: Summary) -> str:
    settings = data["settings"]
    lines = [
        f"- model: {settings['model']}" + (f" at {settings['revision']}" if settings["revision"] else ""),
        f"- weights and tokenizer, SHA-256: {settings['weights']}",
        *(f"- probes of {task}, SHA-256: {digest}" for task, digest in settings["probes"].items()),
        "- options: " + ", ".join(f"{name} {value}" for name, value in settings["options"].items()),
        "- versions: " + ", ".join(f"{name} {version}" for name, version in settings["versions"].items()),
        *("- hardware: " + ", ".join(f"{name} {value}" for name, value in row.items()) for row in data["hardware"]),
    ]
    if data["cells"]:
        seconds = [row["seconds"]["all"] for row in data["cells"]]
        lines.append(f"- a cell took {sum(seconds) / len(seconds):.1f} s on average, {sum(seconds):,.0f} s in all")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])
