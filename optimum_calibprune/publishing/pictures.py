# SPDX-License-Identifier: Apache-2.0
"""What a run kept, as pictures: retention by capability, and each task; for light and dark pages, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..records import CAPABILITIES, CapabilityReport, Scores
from . import plots


RETENTION, TASKS = "retention", "tasks"  # files are named NAME-THEME.svg and .png


def draw(folder: Path, title: str, report: CapabilityReport, scores: Mapping[str, Scores]) -> list[Path]:
    """Writes the pictures of a run to `folder` and returns their paths; none where nothing was measured.

    Args:
        title: what was pruned, as in "someone/model at 60%".
        scores: of the model before ("dense") and after ("sparse").
    """
    if not report.capabilities:
        return []
    rows = _retention(report)
    pairs = _tasks(scores)
    written = []
    for name, theme in plots.THEMES.items():
        for kind in ("svg", "png"):
            kept = {"note": "Sparse score over dense score. Lines: 95 % intervals over the items.", "theme": theme}
            path = folder / f"{RETENTION}-{name}.{kind}"
            written.append(plots.bars(path, f"What {title} keeps", "retention, per cent", rows, **kept))
            if pairs:
                detail = {"note": "Hollow: dense; filled: sparse; upright line: guessing.", "theme": theme}
                path = folder / f"{TASKS}-{name}.{kind}"
                written.append(plots.pairs(path, f"Each task of {title}", "score, per cent", pairs, **detail))
    return written


def _retention(report: CapabilityReport) -> list[plots.Bar]:
    rows = [
        plots.Bar(entry.capability, entry.retention, entry.interval, entry.capability, "undefined: dense is at chance")
        for entry in report.capabilities
    ]
    known = {entry.capability for entry in report.capabilities}
    missing = [
        name for name in CAPABILITIES if name in report.not_measured and name not in known
    ]  # it names tasks, too
    rows += [plots.Bar(name, None, text="not measured") for name in missing]
    if report.total is not None and len(report.measured) > 1:
        rows.append(plots.Bar("total", report.total, report.total_interval))
    return rows


def _tasks(scores: Mapping[str, Scores]) -> list[plots.Pair]:
    after = {task.task: task for task in scores["sparse"].tasks} if scores else {}
    return [
        plots.Pair(task.task, task.value, after[task.task].value, task.chance, task.capability)
        for task in (scores["dense"].tasks if scores else ())
        if task.task in after
    ]
